"""The delta rule as TPU kernels: the chunk of `tile` in the grid of `pallas_chunks`.

The inverse of a chunk's triangular matrix is computed on the whole matrix with masks, in float32.
Each merge of blocks is two products as wide as the matrix unit. The backward computes it again.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kernels.blocks import PallasChunk
from kernels.contract import Options
from kernels.delta_rule import tile
from kernels.delta_rule.tile import How, Memory, Tokens
from kernels.letters import Inputs
from kernels.primitives import pallas_chunks
from kernels.primitives.chunks import Documents
from kernels.primitives.pallas_chunks import Mathematics, Named
from kernels.primitives.products import ROUNDED, SPLIT

DEFAULT = PallasChunk()
CANDIDATES = tuple(PallasChunk(n, heads) for n in (32, 64, 128) for heads in (2, 4, 8))


class Static(NamedTuple):
    """What is known at trace time."""

    scale: float
    how: How


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: Memory,
    *,
    options: Options,
    blocks: PallasChunk | None = None,
) -> tuple[Float[Array, "B T H V"], Memory]:
    """Output and state of T more tokens."""
    products = pallas_chunks.products(inputs["q"].dtype)
    # Every token's write goes through the inverse, and its rounding error stays in S.
    how = How(products, SPLIT if products is ROUNDED else products, None)
    mathematics = Mathematics("delta_rule", _forward, _backward, Static(options["scale"], how))
    out, s, segment = pallas_chunks.run(
        mathematics, inputs, segment_ids, (state.s, state.segment), blocks or DEFAULT
    )
    return out, Memory(s, segment)


def _forward(
    static: Static, x: Named, documents: Documents | None, s: Array
) -> tuple[Array, Array]:
    # The output is scaled and not q, so that bfloat16 queries stay exact.
    out, s = tile.forward(_tokens(x, 1.0), documents, s, static.how)
    return static.scale * out, s


def _backward(
    static: Static,
    x: Named,
    documents: Documents | None,
    s: Array,
    d_out: Array,
    d_s: Array,
) -> tuple[Named, Array]:
    d_x, d_s = tile.backward(_tokens(x, static.scale), documents, s, d_out, d_s, static.how)
    grads = {"q": static.scale * d_x.q, "k": d_x.k, "v": d_x.v, "beta": d_x.beta}
    if d_x.log_decay is not None:
        grads["log_decay"] = d_x.log_decay
    return grads, d_s


def _tokens(x: Named, scale: float) -> Tokens:
    """The tokens of a chunk, with scaled queries."""
    return Tokens(scale * x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"))
