"""Linear attention with decay chunk by chunk in plain XLA, for any backend, with its own backward.

The order of Yang et al. (arXiv 2312.06635, section 4): matrix products within a chunk, and the
memory S from chunk to chunk in a scan. Saved: the inputs, and S at the entry of every chunk
(T K V / C floats per head); the backward scan runs from the last chunk to the first.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Chunk as Sizes
from kernels.contract import Options
from kernels.gated_linear import tile
from kernels.gated_linear.tile import Chunk, GatedState
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.chunks import Documents

DEFAULT = Sizes(length=64, sub=8)


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: GatedState | None,
    *,
    options: Options,
    blocks: Sizes | None = None,
) -> tuple[Float[Array, "B T H V"], GatedState]:
    """Output and state of T more tokens."""
    batch, time, heads, width = inputs["q"].shape
    sizes = _fit(blocks or DEFAULT, time)
    if options["decay"] == "vector" and sizes.length & (sizes.length - 1):
        raise ValueError(
            f"length={sizes.length} must be a power of two with decay='vector'; "
            f"set length={1 << sizes.length.bit_length()}"
        )
    if state is None:
        empty = jnp.zeros((batch, heads, width, inputs["v"].shape[-1]), jnp.float32)
        state = GatedState(empty, jnp.zeros((batch,), jnp.int32))
    documents, segment = chunks.documents(segment_ids, state.segment, sizes.length, time)
    x = _cut(inputs, documents, sizes.length, options["scale"])
    out, s = attend(sizes.sub, x, documents, state.s.astype(jnp.float32))
    out = segments.blank_padding(chunks.join(out, time), segment_ids)
    return out.astype(inputs["q"].dtype), GatedState(s, segment)


def _fit(sizes: Sizes, time: int) -> Sizes:
    """The same sizes, no longer than the power of two that holds all tokens."""
    length = min(sizes.length, 1 << (time - 1).bit_length())
    return Sizes(length, math.gcd(sizes.sub, length))


def _cut(inputs: Inputs, documents: Documents | None, length: int, scale: float) -> Chunk:
    """Chunks of float32 inputs; padding neither writes nor decays."""
    x = {name: chunks.cut(x.astype(jnp.float32), length) for name, x in inputs.items()}
    x["q"] = scale * x["q"]
    if documents is not None:
        keep = documents.keep[:, :, None]
        for name in x.keys() - {"q", "v"}:
            x[name] = jnp.where(keep if x[name].ndim == 4 else keep[..., None], x[name], 0.0)
    return Chunk(x["q"], x["k"], x["v"], x.get("log_decay"))


def _attend(
    sub: int, x: Chunk, documents: Documents | None, s: Float[Array, "B H K V"]
) -> tuple[Float[Array, "N B H C V"], Float[Array, "B H K V"]]:
    """Output of all chunks, and what leaves the last."""
    return _forward(sub, x, documents, s)[0]


def _per_head(documents: Documents | None) -> Documents | None:
    """Masks of one chunk, the same for all heads."""
    return None if documents is None else Documents(*(mask[:, None] for mask in documents))


def _forward(
    sub: int, x: Chunk, documents: Documents | None, s: Array
) -> tuple[tuple[Array, Array], tuple[Chunk, Documents | None, Array]]:
    def visit(s: Array, now: tuple[Chunk, Documents | None]) -> tuple[Array, tuple[Array, Array]]:
        here, documents = now
        out, left = tile.forward(here, _per_head(documents), s, sub)
        return left, (out, s)

    s, (out, entered) = lax.scan(visit, s, (x, documents))
    return (out, s), (x, documents, entered)


def _backward(
    sub: int, saved: tuple[Chunk, Documents | None, Array], cotangents: tuple[Array, Array]
) -> tuple[Chunk, None, Array]:
    d_out, d_s = cotangents

    def visit(
        d_left: Array, now: tuple[Chunk, Documents | None, Array, Array]
    ) -> tuple[Array, Chunk]:
        here, documents, s, d_out = now
        d_here, d_s = tile.backward(here, _per_head(documents), s, d_out, d_left, sub)
        return d_s, d_here

    d_s, d_x = lax.scan(visit, d_s, (*saved, d_out), reverse=True)
    return d_x, None, d_s


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
