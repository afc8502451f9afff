"""Softmax attention by `jax.nn.dot_product_attention`: XLA's dense path, or cuDNN's on a GPU.

The mask is dense (T x S numbers) as soon as documents, blocks or a cache need one. XLA's path also
keeps T x T logits for its backward pass. cuDNN's path keeps one number per query and skips what
causality hides. cuDNN needs an attached GPU: without one, this form is refused for GPUs and not
replaced.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

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
    on_gpu = jax.default_backend() == "gpu"
    out = jax.nn.dot_product_attention(
        q,
        placed.k.astype(q.dtype),
        placed.v.astype(q.dtype),
        bias=None if bias is None else bias.astype(q.dtype),
        mask=mask,
        scale=options["scale"],
        # The mask includes causality too, but does not say what need not be computed.
        is_causal=mask is None or (on_gpu and placed.q_slot is None),
        local_window_size=(window - 1, 0) if window and mask is None else None,
        implementation="cudnn" if on_gpu else "xla",
    )
    return segments.blank_padding(out, placed.q_segment), placed.state


def unsupported(dims: Dims, dtype: DTypeLike, options: Options, target: str) -> str | None:
    """Why this problem cannot run here, or None."""
    for name in ("logits_soft_cap", "sink", "global_tokens", "distance_ceiling"):
        if options[name]:
            return f"jax.nn.dot_product_attention has no {name}={options[name]}"
    if dims["K"] != dims["V"]:
        return f"jax.nn.dot_product_attention needs K={dims['K']} equal to V={dims['V']}"
    return _unsupported_cudnn(dims, dtype, options) if target == "gpu" else None


def _unsupported_cudnn(dims: Dims, dtype: DTypeLike, options: Options) -> str | None:
    if jax.default_backend() != "gpu":
        return "cuDNN needs an attached GPU, and there is none"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    widest = 256 if float(jax.local_devices()[0].compute_capability) >= 9.0 else 128
    if dims["K"] % 8 or dims["K"] > widest:
        return f"on this GPU cuDNN needs K to be a multiple of 8 up to {widest}, not K={dims['K']}"
    if dims["T"] % 2:
        return f"cuDNN's gradient under a mask needs an even T, and T={dims['T']} is odd"
    if options["alibi"]:
        return "alibi=True would round distances to bfloat16 in cuDNN"
    return None
