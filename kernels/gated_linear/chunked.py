"""Linear attention with decay, chunk by chunk in plain XLA, for any backend, with a hand-written
backward.

The order of computation is that of Yang et al. (arXiv 2312.06635, section 4): matrix products
within a chunk, and the memory S from chunk to chunk in a scan (`primitives.xla_chunks`).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Chunk as Sizes
from kernels.contract import Options
from kernels.gated_linear import tile
from kernels.gated_linear.tile import Chunk, GatedState, How
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.products import AS_GIVEN
from kernels.primitives.xla_chunks import Mathematics, recur

DEFAULT = Sizes(length=64, sub=8)


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
    how = How(AS_GIVEN, sizes.sub)
    mathematics = Mathematics(tile.forward, tile.backward, how, options["scale"])
    x = _cut(inputs, segment_ids, sizes.length)
    out, s = recur(mathematics, x, chunks.per_head(marks), state.s.astype(jnp.float32))
    out = segments.blank_padding(chunks.join(out, time), segment_ids)
    return out.astype(inputs["q"].dtype), GatedState(s, segment)


def _fit(sizes: Sizes, time: int) -> Sizes:
    """The same sizes, but no longer than the smallest power of two that holds all tokens."""
    length = min(sizes.length, 1 << (time - 1).bit_length())
    return Sizes(length, math.gcd(sizes.sub, length))


def _cut(inputs: Inputs, segment_ids: Array | None, length: int) -> Chunk:
    """The chunks; padding neither writes nor decays."""
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
