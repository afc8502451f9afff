"""Linear attention with decay as TPU kernels: the chunk of `tile` in the grid of `pallas_chunks`.

Per-channel decay is computed on whole chunks: each level of the halving is one product as wide as
the matrix unit, and a mask keeps the pairs of that level.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.blocks import PallasChunk
from kernels.contract import Options
from kernels.gated_linear import tile
from kernels.gated_linear.tile import Chunk, GatedState, How
from kernels.letters import Inputs
from kernels.primitives import pallas_chunks
from kernels.primitives.chunks import Documents
from kernels.primitives.pallas_chunks import Mathematics, Named

DEFAULT = PallasChunk()
CANDIDATES = tuple(PallasChunk(n, heads) for n in (64, 128, 256) for heads in (2, 4, 8))


class Static(NamedTuple):
    """What is known at trace time."""

    scale: float
    decay: str
    how: How


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: GatedState,
    *,
    options: Options,
    blocks: PallasChunk | None = None,
) -> tuple[Float[Array, "B T H V"], GatedState]:
    """Output and state of T more tokens."""
    how = How(pallas_chunks.products(inputs["q"].dtype), None)
    static = Static(options["scale"], options["decay"], how)
    mathematics = Mathematics("gated_linear", _forward, _backward, static)
    out, s, segment = pallas_chunks.run(
        mathematics, inputs, segment_ids, (state.s, state.segment), blocks or DEFAULT
    )
    return out, GatedState(s, segment)


def _forward(
    static: Static, x: Named, documents: Documents | None, s: Array
) -> tuple[Array, Array]:
    # The output is scaled and not q, so that bfloat16 queries stay exact.
    out, s = tile.forward(_chunk(static, x, documents, 1.0), documents, s, static.how)
    return static.scale * out, s


def _backward(
    static: Static,
    x: Named,
    documents: Documents | None,
    s: Array,
    d_out: Array,
    d_s: Array,
) -> tuple[Named, Array]:
    chunk = _chunk(static, x, documents, static.scale)
    d_x, d_s = tile.backward(chunk, documents, s, d_out, d_s, static.how)
    grads = {"q": static.scale * d_x.q, "k": _kept(d_x.k, documents), "v": d_x.v}
    if d_x.head is not None:
        grads["log_decay"] = d_x.head
    if d_x.channel is not None:
        grads["log_decay"] = _kept(d_x.channel, documents)
    return grads, d_s


def _chunk(static: Static, x: Named, documents: Documents | None, scale: float) -> Chunk:
    """The inputs of a chunk, with scaled queries; padding neither writes nor decays."""
    head = channel = None
    if static.decay == "scalar":
        head = x["log_decay"]
    if static.decay == "vector":
        channel = _kept(x["log_decay"], documents)
    return Chunk(scale * x["q"], _kept(x["k"], documents), x["v"], head, channel)


def _kept(x: Float[Array, "C K"], documents: Documents | None) -> Float[Array, "C K"]:
    return x if documents is None else jnp.where(documents.keep, x, 0.0)
