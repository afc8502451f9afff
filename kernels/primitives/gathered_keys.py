"""Attention over a split time axis by gathering keys and values (context parallelism of Llama 3,
arXiv 2407.21783, section 3.3.2).

Every rank gathers the keys and values of all tokens, and its queries continue the cache that the
tokens of earlier ranks would have left. To the op's local form that is a carried state, so that
windows, positions and documents need nothing of their own. Memory: B T G (K + V) numbers while the
layer runs.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.letters import Inputs
from kernels.primitives import kv_cache
from kernels.primitives.kv_cache import CacheState
from kernels.primitives.time_shards import Shards


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
    """Output of this rank's tokens, and the cache after those of all ranks."""
    del op, options  # the local form knows them
    k, v = (shards.whole(inputs[name]) for name in ("k", "v"))
    batch, time = k.shape[:2]
    if state is None:
        dims = {"G": k.shape[2], "K": k.shape[3], "V": v.shape[3]}
        state = kv_cache.create(dims, k.dtype, batch, time)
    if segment_ids is None:
        ids = jnp.broadcast_to(kv_cache.current_segment(state)[:, None], (batch, time))
    else:
        ids = shards.ranks(segment_ids).reshape(batch, time)
    is_earlier = jnp.arange(time) < shards.rank() * (time // shards.count)
    before, _ = kv_cache.append(state, k, v, jnp.where(is_earlier, ids, 0))
    out, _ = local(inputs, segment_ids, before)
    after, _ = kv_cache.append(state, k, v, ids)
    return out, after


def _sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """Each rank's keys and values go once around; their cotangents come back in float32."""
    del op, options
    numbers = (ranks - 1) * dims["B"] * dims["T"] / ranks * dims["G"] * (dims["K"] + dims["V"])
    return Sent(numbers * itemsize, numbers * 4)


GATHER = Strategy("gather", _run, _sent, takes_all)
