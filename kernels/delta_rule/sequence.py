"""The delta rule over a split time axis: either gather what every rank does to the memory, or pass
the memory from rank to rank.

A token maps the memory S to P S + H, with P = decay (I - beta k k^T), and so do all tokens of a
rank together. Two calls of the local form give everything that is needed. From an empty memory it
returns `out` and H. From the unit matrix, with values of zero, it returns `read` and P. Then

    o_i = out_i + S^T read_i        S' = P S + H

Only P S is ever computed, never P P, and every column of S is computed by itself. So when the
memory is passed on, it is cut into columns, and P is not sent. Where a document starts inside the
shard, the local form itself returns P = 0, and `read` = 0 from there on. P is float32: in bfloat16
a product of many maps keeps only two digits after 16 tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.delta_rule.tile import Memory
from kernels.letters import Inputs
from kernels.primitives import head_exchange, rank_state, state_gather, state_scan
from kernels.primitives.products import EXACT
from kernels.primitives.rank_state import Enter
from kernels.primitives.time_shards import Shards


class Done(NamedTuple):
    """What the tokens of a rank do to the memory."""

    map: Float[Array, "B H K K"]
    added: Float[Array, "B H K V"]


def _advance(done: Done, s: Float[Array, "B H K V"]) -> Float[Array, "B H K V"]:
    return EXACT.nn(done.map, s) + done.added


def _run(
    enter: Enter,
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: Memory,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, Memory]:
    """The output of this rank's tokens, and the memory after the tokens of all ranks."""
    del op, options  # the local form knows them
    entry = shards.entry(segment_ids, state.segment)
    width = inputs["k"].shape[3]
    unit = jnp.broadcast_to(jnp.eye(width), (*state.s.shape[:2], width, width))
    silent = inputs | {"v": jnp.zeros_like(inputs["k"])}
    read, mapped = local(silent, segment_ids, Memory(unit, entry))
    own = local(inputs, segment_ids, Memory(jnp.zeros_like(state.s), entry))
    s = enter(_advance, shards, Done(mapped.s, own[1].s), state.s)
    wide = jnp.moveaxis(read.astype(jnp.float32), 2, 1)
    recalled = jnp.moveaxis(EXACT.nn(wide, s), 1, 2)
    return rank_state.add_entered(own, recalled, EXACT.nn(mapped.s, s), shards)


def _gathered(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """P and H of each rank, and the cotangent of one memory; independent of T."""
    del op, options, itemsize
    matrix = dims["B"] * dims["H"] * dims["K"] ** 2
    return state_gather.sent(matrix + _numbers(dims), _numbers(dims), ranks)


def _handed_on(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """One memory; independent of T."""
    del op, options, itemsize
    return state_scan.sent(_numbers(dims), dims["V"], ranks)


def _numbers(dims: Dims) -> int:
    """The number of numbers in the memory."""
    return dims["B"] * dims["H"] * dims["K"] * dims["V"]


_by_columns = partial(state_scan.enter, state_scan.Cut(axis=3, whole=("map",)))
STRATEGIES = (
    Strategy("states", partial(_run, state_gather.enter), _gathered, takes_all, ("contiguous",)),
    Strategy("scan", partial(_run, _by_columns), _handed_on, takes_all, ("contiguous",)),
    head_exchange.ALL_TO_ALL,
)
