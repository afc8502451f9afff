"""One chunk of linear attention with decay: forward, and a hand-derived backward, float32.

With S the state that enters the chunk, and D_ij = prod_{j < s <= i} decay_s for i >= j, else 0:

    row_i = prod_{s <= i} decay_s        col_j = prod_{s > j} decay_s        total = prod_s decay_s
    P_ij  = D_ij (q_i . k_j)             D inside the sum over K where the decay is per channel
    O     = (row q) S + P V              S' = total S + (col k)^T V

Every factor is a product of decays, so it is at most 1. Backward, with dS' the cotangent of S':

    dP = dO V^T where P is not masked    dV = P^T dO + (col k) dS'
    d(row q) = dO S^T                    d(col k) = V dS'^T        dS = total dS' + (row q)^T dO
    dq = row d(row q) + (dP D) k         dk = col d(col k) + (dP D)^T q

The cotangent of a log decay is the sum of the cotangents of log factors, over the factors that
contain it: P dP for D, (row q) d(row q), (col k) d(col k), total <S, dS'>. It is summed inside the
chunk. A sum of q dq - k dk from the end of the whole sequence would be equal, but large terms would
have to cancel in it.

Where a document begins inside the chunk, the masks of `chunks.Documents` set factors to zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.primitives import decay_halves, decay_span, square
from kernels.primitives.chunks import Documents
from kernels.primitives.decay_halves import Level
from kernels.primitives.products import Products


class GatedState(NamedTuple):
    """The memory of each head, and the document of the last token."""

    s: Float[Array, "B H K V"]
    segment: Int[Array, " B"]


FIELDS = (("s", "B H K V"), ("segment", "B"))


class Chunk(NamedTuple):
    """The inputs of a chunk (q scaled), or their cotangents; `head`, `channel` are log decays."""

    q: Float[Array, "*batch C K"]
    k: Float[Array, "*batch C K"]
    v: Float[Array, "*batch C V"]
    head: Float[Array, "*batch 1 C"] | None
    channel: Float[Array, "*batch C K"] | None


class How(NamedTuple):
    """How matrices are multiplied, and the `sub` of `decay_halves`."""

    products: Products
    sub: int | None


class Gates(NamedTuple):
    """The factors of a chunk; None stands for ones.

    `pairs` is D for per-head decay; `levels` represent it for per-channel decay.
    """

    seen: Bool[Array, "*batch C C"]
    pairs: Float[Array, "*batch C C"] | None
    levels: tuple[Level, ...]
    row: Float[Array, "*batch C #K"] | None
    col: Float[Array, "*batch C #K"] | None
    total: Float[Array, "*batch #K 1"] | None


def forward(
    x: Chunk, documents: Documents | None, s: Float[Array, "*batch K V"], how: How
) -> tuple[Float[Array, "*batch C V"], Float[Array, "*batch K V"]]:
    """The output of the chunk, and the state that leaves it."""
    gates, products = _gates(x, documents, how), how.products
    reading, writing = _times(gates.row, x.q), _times(gates.col, x.k)
    out = products.nn(reading, s) + products.nn(_weigh(x, gates, how), x.v)
    return out, _times(gates.total, s) + products.tn(writing, x.v)


def backward(
    x: Chunk,
    documents: Documents | None,
    s: Float[Array, "*batch K V"],
    d_out: Float[Array, "*batch C V"],
    d_left: Float[Array, "*batch K V"],
    how: How,
) -> tuple[Chunk, Float[Array, "*batch K V"]]:
    """The cotangents of the inputs, and of the state that enters."""
    gates, products = _gates(x, documents, how), how.products
    weights = _weigh(x, gates, how)
    d_weights = jnp.where(gates.seen, products.nt(d_out, x.v), 0.0)
    reading, writing = _times(gates.row, x.q), _times(gates.col, x.k)
    d_v = products.tn(weights, d_out) + products.nn(writing, d_left)
    d_reading, d_writing = products.nt(d_out, s), products.nt(x.v, d_left)
    d_s = _times(gates.total, d_left) + products.tn(reading, d_out)
    ends = Level(reading * d_reading, writing * d_writing)
    through = None if gates.total is None else gates.total * jnp.sum(s * d_left, -1, keepdims=True)
    d_head = d_channel = None
    if gates.levels:
        assert through is not None
        d_q, d_k, inner = decay_halves.cotangents(
            x.q, x.k, gates.levels, d_weights, how.sub, products
        )
        d_channel = decay_halves.pull([*inner, ends], how.sub) + square.to_row(through)
    else:
        d_scores = _times(gates.pairs, d_weights)
        d_q, d_k = products.nn(d_scores, x.k), products.tn(d_scores, x.q)
        if x.head is not None:
            assert through is not None
            d_head = decay_span.cotangent(
                weights * d_weights,
                jnp.sum(ends.since, axis=-1, keepdims=True),
                jnp.sum(ends.until, axis=-1, keepdims=True),
                jnp.sum(through, axis=-2, keepdims=True),
                products,
            )
    d_q = d_q + _times(gates.row, d_reading)
    d_k = d_k + _times(gates.col, d_writing)
    return Chunk(d_q, d_k, d_v, d_head, d_channel), d_s


def _gates(x: Chunk, documents: Documents | None, how: How) -> Gates:
    """All factors of the chunk; those between different documents are zero."""
    gates = Gates(square.lower(x.q.shape[-2]), None, (), None, None, None)
    if x.channel is not None:
        levels = decay_halves.levels(x.channel, how.sub)
        since, until = levels[-1]
        gates = gates._replace(
            levels=levels, row=since, col=until, total=square.to_column(since[..., -1:, :])
        )
    elif x.head is not None:
        row = jnp.exp(decay_span.start(x.head))
        gates = gates._replace(
            pairs=jnp.exp(decay_span.spans(x.head, how.products)),
            row=row,
            col=jnp.exp(decay_span.rest(x.head)),
            total=row[..., -1:, :],
        )
    if documents is None:
        return gates
    return gates._replace(
        seen=gates.seen & documents.same,
        row=_only(documents.entry, gates.row),
        col=_only(documents.last, gates.col),
        total=_only(documents.through, gates.total),
    )


def _weigh(x: Chunk, gates: Gates, how: How) -> Float[Array, "*batch C C"]:
    """P: the weight of each value for each token."""
    if gates.levels:
        scores = decay_halves.scores(x.q, x.k, gates.levels, how.sub, how.products)
    else:
        scores = _times(gates.pairs, how.products.nt(x.q, x.k))
    return jnp.where(gates.seen, scores, 0.0)


def _only(mask: Bool[Array, "*any"], factor: Array | None) -> Array:
    return jnp.where(mask, 1.0 if factor is None else factor, 0.0)


def _times(factor: Array | None, x: Array) -> Array:
    return x if factor is None else factor * x
