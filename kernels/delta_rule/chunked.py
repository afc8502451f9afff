"""The delta rule chunk by chunk in plain XLA, for any backend, with its own backward.

A scan over chunks carries the state; all of a chunk is computed inside it, so that the working set
is one chunk of every head. The backward scans from the last chunk to the first and carries the
cotangent of the state. Saved: inputs, and the state at the entry of every chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Chunk, round_up
from kernels.contract import Options
from kernels.delta_rule import tile
from kernels.delta_rule.tile import How, Memory, Tokens
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.chunks import Marks
from kernels.primitives.products import AS_GIVEN


class Static(NamedTuple):
    """What is known at trace time."""

    scale: float
    how: How


class Residuals(NamedTuple):
    """What the backward pass needs; everything has the chunks first."""

    x: Tokens
    marks: Marks | None
    entered: Float[Array, "N B H K V"]


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: Memory,
    *,
    options: Options,
    blocks: Chunk | None = None,
) -> tuple[Float[Array, "B T H V"], Memory]:
    """Output and state of T more tokens."""
    time = inputs["k"].shape[1]
    blocks = blocks or Chunk(length=32)
    length = min(blocks.length, round_up(time, blocks.sub))
    marks, segment = chunks.marks(segment_ids, state.segment, length, time)
    x = Tokens(
        chunks.cut(inputs["q"], length),
        chunks.cut(inputs["k"], length),
        chunks.cut(inputs["v"], length),
        _rows(inputs["beta"], segment_ids, length),
        None if "log_decay" not in inputs else _rows(inputs["log_decay"], segment_ids, length),
    )
    static = Static(options["scale"], How(AS_GIVEN, AS_GIVEN, blocks.sub))
    out, s = recur(static, x, chunks.per_head(marks), state.s.astype(jnp.float32))
    out = segments.blank_padding(chunks.join(out, time), segment_ids)
    return out.astype(inputs["q"].dtype), Memory(s, segment)


def _rows(
    x: Float[Array, "B T H"], segment_ids: Array | None, length: int
) -> Float[Array, "N B H 1 C"]:
    """With beta = 0 and no decay a token of padding leaves the state as it is."""
    return chunks.cut(segments.blank_padding(x, segment_ids), length)[..., None, :]


def _recur(
    static: Static, x: Tokens, marks: Marks | None, s: Array
) -> tuple[Float[Array, "N B H C V"], Float[Array, "B H K V"]]:
    """Output of all chunks, and the state after them."""
    return _forward(static, x, marks, s)[0]


def _forward(
    static: Static, x: Tokens, marks: Marks | None, s: Array
) -> tuple[tuple[Array, Array], Residuals]:
    def advance(s: Array, chunk: tuple[Tokens, Marks | None]) -> tuple[Array, Any]:
        now = _widen(chunk[0], static)
        out, new = tile.forward(now, chunks.documents(chunk[1]), s, static.how)
        return new, (out, s)

    s, (out, entered) = lax.scan(advance, s, (x, marks))
    return (out, s), Residuals(x, marks, entered)


def _backward(
    static: Static, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Tokens, None, Array]:
    d_out, d_s = cotangents

    def retreat(d_s: Array, chunk: tuple[Residuals, Array]) -> tuple[Array, Tokens]:
        (x, marks, s), d_out = chunk
        now = _widen(x, static)
        d_x, d_s = tile.backward(now, chunks.documents(marks), s, d_out, d_s, static.how)
        d_x = d_x._replace(q=d_x.q * static.scale)
        return d_s, jax.tree.map(lambda grad, primal: grad.astype(primal.dtype), d_x, x)

    d_s, d_x = lax.scan(retreat, d_s, (saved, d_out), reverse=True)
    return d_x, None, d_s


def _widen(x: Tokens, static: Static) -> Tokens:
    """One chunk in float32, queries scaled."""
    x = jax.tree.map(lambda array: array.astype(jnp.float32), x)
    return x._replace(q=x.q * static.scale)


recur = jax.custom_vjp(_recur, nondiff_argnums=(0,))
recur.defvjp(_forward, _backward)
