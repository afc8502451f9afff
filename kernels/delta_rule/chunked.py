"""The delta rule chunk by chunk in plain XLA, for any backend, with a hand-written backward.

It runs the chunks of `tile` in the scan of `primitives.xla_chunks`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Chunk, round_up
from kernels.contract import Options
from kernels.delta_rule import tile
from kernels.delta_rule.tile import How, Memory, Tokens
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.products import AS_GIVEN
from kernels.primitives.xla_chunks import Mathematics, recur


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
    how = How(AS_GIVEN, AS_GIVEN, blocks.sub)
    mathematics = Mathematics(tile.forward, tile.backward, how, options["scale"])
    out, s = recur(mathematics, x, chunks.per_head(marks), state.s.astype(jnp.float32))
    out = segments.blank_padding(chunks.join(out, time), segment_ids)
    return out.astype(inputs["q"].dtype), Memory(s, segment)


def _rows(
    x: Float[Array, "B T H"], segment_ids: Array | None, length: int
) -> Float[Array, "N B H 1 C"]:
    """Gates as rows of chunks. With beta = 0 and no decay, padding leaves the state unchanged."""
    return chunks.cut(segments.blank_padding(x, segment_ids), length)[..., None, :]
