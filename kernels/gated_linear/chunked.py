"""Linear attention with decay chunk by chunk in plain XLA, for any backend, with its own backward.

The order of Yang et al. (arXiv 2312.06635, section 4): matrix products within a chunk, and the
memory S from chunk to chunk in a scan. Saved: the inputs, and S at the entry of every chunk
(T K V / C floats per head); the backward scan runs from the last chunk to the first.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Chunk as Sizes
from kernels.contract import Options
from kernels.gated_linear import tile
from kernels.gated_linear.tile import Chunk, GatedState, How
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.chunks import Marks
from kernels.primitives.products import AS_GIVEN

DEFAULT = Sizes(length=64, sub=8)


class Static(NamedTuple):
    """What is known at trace time."""

    scale: float
    how: How


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: GatedState,
    *,
    options: Options,
    blocks: Sizes | None = None,
) -> tuple[Float[Array, "B T H V"], GatedState]:
    """Output and state of T more tokens."""
    time = inputs["q"].shape[1]
    sizes = _fit(blocks or DEFAULT, time)
    if options["decay"] == "vector" and sizes.length & (sizes.length - 1):
        raise ValueError(
            f"length={sizes.length} must be a power of two with decay='vector'; "
            f"set length={1 << sizes.length.bit_length()}"
        )
    marks, segment = chunks.marks(segment_ids, state.segment, sizes.length, time)
    static = Static(options["scale"], How(AS_GIVEN, sizes.sub))
    x = _cut(inputs, segment_ids, sizes.length)
    out, s = attend(static, x, chunks.per_head(marks), state.s.astype(jnp.float32))
    out = segments.blank_padding(chunks.join(out, time), segment_ids)
    return out.astype(inputs["q"].dtype), GatedState(s, segment)


def _fit(sizes: Sizes, time: int) -> Sizes:
    """The same sizes, no longer than the power of two that holds all tokens."""
    length = min(sizes.length, 1 << (time - 1).bit_length())
    return Sizes(length, math.gcd(sizes.sub, length))


def _cut(inputs: Inputs, segment_ids: Array | None, length: int) -> Chunk:
    """Chunks; padding neither writes nor decays."""
    blank = {
        n: x if n in "qv" else segments.blank_padding(x, segment_ids) for n, x in inputs.items()
    }
    x = {name: chunks.cut(x, length) for name, x in blank.items()}
    log_decay = x.get("log_decay")
    head = channel = None
    if log_decay is not None and log_decay.ndim == 4:
        head = log_decay[..., None, :]
    else:
        channel = log_decay
    return Chunk(x["q"], x["k"], x["v"], head, channel)


def _widen(x: Chunk, static: Static) -> Chunk:
    """One chunk in float32, queries scaled."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), x)
    return wide._replace(q=static.scale * wide.q)


def _attend(
    static: Static, x: Chunk, marks: Marks | None, s: Float[Array, "B H K V"]
) -> tuple[Float[Array, "N B H C V"], Float[Array, "B H K V"]]:
    """Output of all chunks, and what leaves the last."""
    return _forward(static, x, marks, s)[0]


def _forward(
    static: Static, x: Chunk, marks: Marks | None, s: Array
) -> tuple[tuple[Array, Array], tuple[Chunk, Marks | None, Array]]:
    def visit(s: Array, now: tuple[Chunk, Marks | None]) -> tuple[Array, tuple[Array, Array]]:
        here, marks = now
        documents = chunks.documents(marks)
        out, left = tile.forward(_widen(here, static), documents, s, static.how)
        return left, (out, s)

    s, (out, entered) = lax.scan(visit, s, (x, marks))
    return (out, s), (x, marks, entered)


def _backward(
    static: Static, saved: tuple[Chunk, Marks | None, Array], cotangents: tuple[Array, Array]
) -> tuple[Chunk, None, Array]:
    d_out, d_s = cotangents

    def visit(d_left: Array, now: tuple[Chunk, Marks | None, Array, Array]) -> tuple[Array, Chunk]:
        here, marks, s, d_out = now
        wide, documents = _widen(here, static), chunks.documents(marks)
        d_here, d_s = tile.backward(wide, documents, s, d_out, d_left, static.how)
        d_here = d_here._replace(q=static.scale * d_here.q)
        return d_s, jax.tree.map(lambda grad, x: grad.astype(x.dtype), d_here, here)

    d_s, d_x = lax.scan(visit, d_s, (*saved, d_out), reverse=True)
    return d_x, None, d_s


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
