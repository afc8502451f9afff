"""Attention over a split time axis by gathering keys and values (context parallelism of Llama 3,
arXiv 2407.21783, section 3.3.2).

Every rank gathers the keys and values of all tokens. Its queries continue the cache that the tokens
before them would have left (in zig-zag, one cache for each of the rank's two stretches). The op's
local form sees this as a carried state, so windows, positions and documents need no code of their
own. Memory: B T G (K + V) numbers while the layer runs.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.letters import Inputs
from kernels.primitives import kv_cache
from kernels.primitives.kv_cache import CacheState
from kernels.primitives.time_shards import LAYOUTS, Shards


def _run(
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: CacheState | None,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, CacheState]:
    """The output of this rank's tokens, and the cache after the tokens of all ranks."""
    before, k, v, ids = appended(inputs, segment_ids, state, shards)
    time = k.shape[1]
    along = [name for name, spec in op.needed(options).items() if "T" in spec.letters.split()]
    size = time // shards.count // shards.stretches
    outs = []
    for i, first in enumerate(shards.first(shards.rank(), time // shards.count)):
        cut = lambda x, i=i: x[:, i * size : (i + 1) * size]
        seen, _ = kv_cache.append(before, k, v, jnp.where(jnp.arange(time) < first, ids, 0))
        mine = inputs | {name: cut(inputs[name]) for name in along}
        outs.append(local(mine, None if segment_ids is None else cut(segment_ids), seen)[0])
    after, _ = kv_cache.append(before, k, v, ids)
    return jnp.concatenate(outs, axis=1), after


def appended(
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: CacheState | None,
    shards: Shards,
) -> tuple[CacheState, Float[Array, "B T G K"], Float[Array, "B T G V"], Int[Array, "B T"]]:
    """The cache before the row (an empty one where none is carried), and the keys, values and
    documents of all tokens of the row: the arguments of `kv_cache.append`.
    """
    k, v = (shards.whole(inputs[name]) for name in ("k", "v"))
    batch, time = k.shape[:2]
    if state is None:
        dims = {"G": k.shape[2], "K": k.shape[3], "V": v.shape[3]}
        state = kv_cache.create(dims, k.dtype, batch, time)
    if segment_ids is None:
        ids = jnp.broadcast_to(kv_cache.current_segment(state)[:, None], (batch, time))
    else:
        ids = shards.row(segment_ids)
    return state, k, v, ids


def _sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """Each rank's keys and values are gathered once; their cotangents are scattered in float32."""
    del op, options
    numbers = (ranks - 1) * dims["B"] * dims["T"] / ranks * dims["G"] * (dims["K"] + dims["V"])
    calls = {"all_gather": 2, "reduce_scatter": 2}
    return Sent(numbers * itemsize, numbers * 4, 2 * (ranks - 1), calls)


GATHER = Strategy("gather", _run, _sent, takes_all, LAYOUTS)
