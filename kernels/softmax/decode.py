"""Softmax attention, one token at a time: one pass over the cache, O(S) per token."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import kv_cache
from kernels.primitives.kv_cache import CacheState
from kernels.softmax import tile


def step(
    state: CacheState, inputs: Inputs, *, options: Options
) -> tuple[CacheState, Float[Array, "B H V"]]:
    """Write the token's key and value, then read the cache with its query."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    state, distance, seen = kv_cache.extend(state, k, v, window=options["window"])
    batch, heads, width = q.shape
    groups = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, groups, heads // groups, width)
    bias = None
    if options["alibi"]:
        slopes = inputs["alibi_slopes"].reshape(groups, heads // groups, 1)
        bias = slopes * distance.astype(jnp.float32)[:, None, None]
    keys = state.k.astype(jnp.float32).transpose(0, 2, 3, 1)
    values = state.v.astype(jnp.float32).transpose(0, 2, 1, 3)
    scaled = grouped * options["scale"]
    logits = tile.score(scaled, keys, seen[:, None, None], bias, options["logits_soft_cap"]).logits
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    out = (weights @ values) / jnp.sum(weights, axis=-1, keepdims=True)
    return state, out.reshape(batch, heads, -1).astype(q.dtype)
