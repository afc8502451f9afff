"""Softmax attention by `jax.nn.dot_product_attention`: XLA's dense path, cuDNN's on GPU.

The mask is dense (T x S booleans) as soon as documents, blocks, a cache or ALiBi ask for one, and
XLA's path keeps T x T logits for its backward.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.contract import Dims, Options
from kernels.letters import Inputs
from kernels.primitives import kv_cache
from kernels.primitives.kv_cache import CacheState


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: CacheState | None,
    *,
    options: Options,
    blocks: None = None,
) -> tuple[Float[Array, "B T H V"], CacheState]:
    """Output and state of T more tokens."""
    assert blocks is None
    q = inputs["q"]
    placed = kv_cache.place(inputs["k"], inputs["v"], segment_ids, state)
    index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    slot = index if placed.q_slot is None else placed.q_slot
    source = jnp.arange(placed.k.shape[1], dtype=jnp.int32)
    mask, bias, window = None, None, options["window"]
    where = kv_cache.subdivide(placed, options["block"]) if options["block"] else placed
    if where.q_segment is not None and where.kv_segment is not None:
        pair = where.q_segment[:, :, None], where.kv_segment[:, None]
        mask = segments.visible(slot[:, :, None], source, *pair, window=window)[:, None]
    if options["alibi"]:
        distance = (slot[:, :, None] - source).astype(jnp.float32)
        bias = -inputs["alibi_slopes"][:, None, None] * distance[:, None]
    out = jax.nn.dot_product_attention(
        q,
        placed.k.astype(q.dtype),
        placed.v.astype(q.dtype),
        bias=None if bias is None else bias.astype(q.dtype),
        mask=mask,
        scale=options["scale"],
        is_causal=mask is None,
        local_window_size=(window - 1, 0) if window and mask is None else None,
    )
    return segments.blank_padding(out, placed.q_segment), placed.state


def unsupported(dims: Dims, options: Options) -> str | None:
    """Why this problem cannot run here, or None."""
    for name in ("logits_soft_cap", "sink", "global_tokens", "distance_ceiling"):
        if options[name]:
            return f"jax.nn.dot_product_attention has no {name}={options[name]}"
    if dims["K"] != dims["V"]:
        return f"jax.nn.dot_product_attention needs K={dims['K']} equal to V={dims['V']}"
    return None
