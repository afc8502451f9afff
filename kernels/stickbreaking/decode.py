"""Stick-breaking attention, one token at a time: one pass over the cache, O(S) per token."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import kv_cache
from kernels.primitives.kv_cache import ByHead, CacheState


def step[C: (CacheState, ByHead)](
    state: C, inputs: Inputs, *, options: Options
) -> tuple[C, Float[Array, "B H V"]]:
    """Writes the token's key and value, then breaks the query's stick over the cache."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    state, _, seen = kv_cache.extend(state, k, v, strict=not options["attend_current"])
    seen = seen[:, None, None]
    batch, heads, width = q.shape
    groups = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, groups, heads // groups, width)
    cache = kv_cache.by_head(state)
    keys, values = cache.k.astype(jnp.float32), cache.v.astype(jnp.float32)
    z = (grouped * options["scale"]) @ keys.swapaxes(2, 3)
    broken = jnp.where(seen, jax.nn.softplus(z), 0.0)
    through = lax.cumsum(broken, axis=3, reverse=True)
    # Shifted, not `through - broken`: where one key takes everything, the difference would cancel.
    nearer = jnp.pad(through[..., 1:], [(0, 0)] * 3 + [(0, 1)])
    weights = jnp.where(seen, jnp.exp(jax.nn.log_sigmoid(z) - nearer), 0.0)
    out = (weights @ values).reshape(batch, heads, -1)
    remainder = jnp.exp(-through[..., 0]).reshape(batch, heads, 1)
    if options["remainder"] == "value":
        out = out + remainder * jnp.repeat(v.astype(jnp.float32), heads // groups, axis=1)
    if options["remainder"] == "bias":
        out = out + remainder * inputs["remainder_bias"].astype(jnp.float32)
    return state, out.astype(q.dtype)
