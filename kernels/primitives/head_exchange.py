"""Any op over a split time axis, by exchanging tokens for heads (DeepSpeed-Ulysses, Jacobs et al.,
arXiv 2309.14509).

An all-to-all turns T/R tokens of every head into all T tokens of H/R heads, the op runs on whole
rows, and another all-to-all turns its output back. This works for any op whose heads do not see
each other. T = 4, H = 4, R = 2:

    rank       0                   1                      0                  1
    tokens     0 1                 2 3          ->        0 1 2 3            0 1 2 3
    heads      0 1 2 3             0 1 2 3                0 1                2 3

If there are fewer key/value heads than ranks, each is sent to every rank that reads it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy
from kernels.letters import Inputs
from kernels.primitives.grouped_heads import GroupedHeads, along, along_each
from kernels.primitives.time_shards import LAYOUTS, Shards


def _run(
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: Any,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, Any]:
    """The output of this rank's tokens, and the state after the tokens of all ranks."""
    letters = {name: spec.letters for name, spec in op.needed(options).items()}
    given = {name: _whole_rows(x, letters[name], shards) for name, x in inputs.items()}
    ids = None if segment_ids is None else shards.row(segment_ids)
    own = lambda x, axis: GroupedHeads(shards.axes, shards.count, x.shape[axis]).own(x, axis)
    fields = op.state.fields
    carried = None if state is None else along_each("HG", own, state, fields)
    out, after = local(given, ids, carried)
    place = op.out.split().index("H")
    out = shards.by_rank(out, 1)
    out = lax.all_to_all(out, shards.axes, split_axis=1, concat_axis=place, tiled=True)
    heads = {
        letter: x.shape[letters[name].split().index(letter)]
        for name, x in inputs.items()
        for letter in set(letters[name].split()) & {"H", "G"}
    }

    def every_head(letter: str, x: Array, axis: int) -> Array:
        found = lax.all_gather(x, shards.axes, axis=axis, tiled=True)
        return GroupedHeads(shards.axes, shards.count, heads[letter]).once(found, axis)

    for letter in heads:
        after = along_each(letter, partial(every_head, letter), after, fields)
    return out, after


def _whole_rows(x: Array, letters: str, shards: Shards) -> Array:
    """An input with this rank's part of the heads and all tokens."""
    names = letters.split()

    def exchange(x: Array, axis: int) -> Array:
        if "T" not in names:
            return GroupedHeads(shards.axes, shards.count, x.shape[axis]).own(x, axis)
        copies = max(1, shards.count // x.shape[axis])
        x = jnp.repeat(x, copies, axis=axis) if copies > 1 else x
        time = names.index("T")
        whole = lax.all_to_all(x, shards.axes, split_axis=axis, concat_axis=time, tiled=True)
        return shards.in_order(whole, time)

    return along("HG", exchange, x, letters)


def _unsupported(dims: Dims, options: Options, ranks: int) -> str | None:
    del options
    if dims["H"] % ranks:
        return f"H={dims['H']} heads must be a multiple of {ranks} ranks"
    groups = dims.get("G", ranks)
    if groups % ranks and ranks % groups:
        return f"G={groups} heads must be a multiple of {ranks} ranks, or divide them"
    return None


def _sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """A rank keeps 1/R of every input and output with one entry per token, and sends the rest.
    Their cotangents are sent back in the same dtypes.
    """
    sizes = {**dims, "T": dims["T"] / ranks}
    if "G" in dims:
        sizes["G"] = max(dims["G"], ranks)
    texts = [spec.letters.split() for spec in op.needed(options).values()] + [op.out.split()]
    moved = [names for names in texts if "T" in names and {"H", "G"} & set(names)]
    numbers = sum(float(np.prod([sizes[letter] for letter in names])) for names in moved)
    sent = (ranks - 1) / ranks * numbers * itemsize
    return Sent(sent, sent, 4, {"all_to_all": 2 * len(moved)})


ALL_TO_ALL = Strategy("all_to_all", _run, _sent, _unsupported, LAYOUTS)
