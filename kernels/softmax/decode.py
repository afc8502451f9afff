"""Softmax attention, one token at a time: one pass over the cache, O(S) per token."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import segments
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import kv_cache, rope
from kernels.primitives.kv_cache import ByHead, CacheState
from kernels.softmax import tile


def step[C: (CacheState, ByHead)](
    state: C, inputs: Inputs, *, options: Options
) -> tuple[C, Float[Array, "B H V"]]:
    """Writes the token's key and value, then reads the cache with its query."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    window = 0 if options["global_tokens"] else options["window"]
    state, distance, seen = kv_cache.extend(state, k, v, window=window)
    position = segments.positions(state.segment_ids)
    if size := options["block"]:
        # A visible key is in the token's document; the token's position is then this sum.
        seen &= (position + distance) // size == position // size
    if options["global_tokens"]:
        seen &= (distance < options["window"]) | (position < options["global_tokens"])
    batch, heads, _ = q.shape
    cache, bias = kv_cache.by_head(state), None
    if options["alibi"]:
        slopes = inputs["alibi_slopes"].reshape(k.shape[1], -1, 1)
        bias = slopes * distance.astype(jnp.float32)[:, None, None]
    if not options["distance_ceiling"]:
        products = _multiply(q, cache.k, options)
    else:
        theta = options["rope_theta"]
        own = jnp.take_along_axis(position, jnp.maximum(state.length - 1, 0)[:, None], axis=1)
        slots = cache.k.astype(jnp.float32).swapaxes(1, 2)
        turned = rope.rotate(slots, position, theta=theta).swapaxes(1, 2)
        near = _multiply(_turn(q, own, theta), turned, options)
        ceiling = jnp.full((1, 1), options["distance_ceiling"], jnp.int32)
        far = _multiply(_turn(q, ceiling, theta), cache.k, options)
        products = jnp.where((distance < options["window"])[:, None, None], near, far)
    cap = options["logits_soft_cap"]
    logits = tile.score(products, seen[:, None, None], bias, cap).logits
    largest = jnp.max(logits, axis=-1, keepdims=True)
    sinks = None
    if options["sink"]:
        sinks = inputs["sink"].astype(jnp.float32).reshape(k.shape[1], -1, 1)
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - largest)
    out = (weights @ cache.v.astype(jnp.float32)) / total
    return state, out.reshape(batch, heads, -1).astype(q.dtype)


def _multiply(
    q: Float[Array, "B H K"], k: Float[Array, "B G S K"], options: Options
) -> Float[Array, "B G R S"]:
    """scale q k, with queries grouped by the key head that they read."""
    batch, heads, width = q.shape
    groups = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, groups, heads // groups, width)
    return (grouped * options["scale"]) @ k.astype(jnp.float32).swapaxes(2, 3)


def _turn(q: Float[Array, "B H K"], position: Array, theta: float) -> Float[Array, "B H K"]:
    return rope.rotate(q.astype(jnp.float32)[:, None], position, theta=theta)[:, 0]
