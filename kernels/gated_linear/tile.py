"""One chunk of linear attention with decay: forward, and backward by hand, float32.

With S what enters the chunk and D_ij = prod_{j < s <= i} decay_s for i >= j, else 0:

    row_i = prod_{s <= i} decay_s        col_j = prod_{s > j} decay_s        total = prod_s decay_s
    P_ij  = D_ij (q_i . k_j)             D inside the sum over K where the decay is per channel
    O     = (row q) S + P V              S' = total S + (col k)^T V

Every factor is a product of decays, at most one. Backward, with dS' the cotangent of what leaves:

    dP = dO V^T where P is not masked    dV = P^T dO + (col k) dS'
    d(row q) = dO S^T                    d(col k) = V dS'^T        dS = total dS' + (row q)^T dO
    dq = row d(row q) + (dP D) k         dk = col d(col k) + (dP D)^T q

The cotangent of a log decay is the sum of (log factor)'s over the factors it is in: P dP for D,
(row q) d(row q), (col k) d(col k), total <S, dS'>. Summed inside a chunk; over the whole sequence,
as sums of q dq - k dk from the end, large terms would have to cancel.

Where documents meet inside the chunk, the masks of `chunks.Documents` set factors to zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.primitives import decay_halves, decay_span
from kernels.primitives.chunks import Documents
from kernels.primitives.decay_halves import Level


class GatedState(NamedTuple):
    """The memory of each head, and the document of the last token."""

    s: Float[Array, "B H K V"]
    segment: Int[Array, " B"]


FIELDS = (("s", "B H K V"), ("segment", "B"))


class Chunk(NamedTuple):
    """Inputs of a chunk, q scaled, or their cotangents; decay of heads [C] or channels [C K]."""

    q: Float[Array, "*batch C K"]
    k: Float[Array, "*batch C K"]
    v: Float[Array, "*batch C V"]
    log_decay: Float[Array, "*batch"] | None


class Gates(NamedTuple):
    """The factors of a chunk; None stands for ones.

    `pairs` is D of decays per head; `levels` hold that of decays per channel.
    """

    seen: Bool[Array, "*batch C C"] | np.ndarray
    pairs: Float[Array, "*batch C C"] | None
    levels: tuple[Level, ...]
    row: Float[Array, "*batch C #K"] | None
    col: Float[Array, "*batch C #K"] | None
    total: Float[Array, "*batch #K 1"] | None


def forward(
    x: Chunk, documents: Documents | None, s: Float[Array, "*batch K V"], sub: int
) -> tuple[Float[Array, "*batch C V"], Float[Array, "*batch K V"]]:
    """Output of the chunk, and what leaves it."""
    gates = _gates(x, documents)
    out = _times(gates.row, x.q) @ s + _weigh(x, gates, sub) @ x.v
    return out, _times(gates.total, s) + _transpose(_times(gates.col, x.k)) @ x.v


def backward(
    x: Chunk,
    documents: Documents | None,
    s: Float[Array, "*batch K V"],
    d_out: Float[Array, "*batch C V"],
    d_left: Float[Array, "*batch K V"],
    sub: int,
) -> tuple[Chunk, Float[Array, "*batch K V"]]:
    """Cotangents of the inputs, and of what enters."""
    gates = _gates(x, documents)
    weights = _weigh(x, gates, sub)
    d_weights = jnp.where(gates.seen, d_out @ _transpose(x.v), 0.0)
    reading, writing = _times(gates.row, x.q), _times(gates.col, x.k)
    d_v = _transpose(weights) @ d_out + writing @ d_left
    d_reading, d_writing = d_out @ _transpose(s), x.v @ _transpose(d_left)
    d_s = _times(gates.total, d_left) + _transpose(reading) @ d_out
    ends = Level(reading * d_reading, writing * d_writing)
    through = None if gates.total is None else gates.total * jnp.sum(s * d_left, -1, keepdims=True)
    if gates.levels:
        assert through is not None
        d_q, d_k, inner = decay_halves.cotangents(x.q, x.k, gates.levels, d_weights, sub)
        d_log_decay = decay_halves.pull([*inner, ends]) + _transpose(through)
    else:
        d_scores = _times(gates.pairs, d_weights)
        d_q, d_k = d_scores @ x.k, _transpose(d_scores) @ x.q
        d_log_decay = None
        if through is not None:
            d_log_decay = decay_span.cotangent(
                weights * d_weights,
                jnp.sum(ends.since, axis=-1),
                jnp.sum(ends.until, axis=-1),
                jnp.sum(through, axis=(-2, -1)),
            )
    d_q = d_q + _times(gates.row, d_reading)
    d_k = d_k + _times(gates.col, d_writing)
    return Chunk(d_q, d_k, d_v, d_log_decay), d_s


def _gates(x: Chunk, documents: Documents | None) -> Gates:
    """All factors of the chunk, those between documents zero."""
    gates = Gates(np.tri(x.q.shape[-2], dtype=bool), None, (), None, None, None)
    if x.log_decay is not None and x.log_decay.ndim == x.q.ndim:
        levels = decay_halves.levels(x.log_decay)
        since, until = levels[-1]
        gates = gates._replace(
            levels=levels, row=since, col=until, total=_transpose(since[..., -1:, :])
        )
    elif x.log_decay is not None:
        span = decay_span.spans(x.log_decay)
        row = jnp.exp(span[..., 0] + x.log_decay[..., :1])[..., None]
        gates = gates._replace(
            pairs=jnp.exp(span),
            row=row,
            col=jnp.exp(span[..., -1, :])[..., None],
            total=row[..., -1:, :],
        )
    if documents is None:
        return gates
    return gates._replace(
        seen=gates.seen & documents.same,
        row=_only(documents.entry[..., None], gates.row),
        col=_only(documents.last[..., None], gates.col),
        total=_only(documents.through[..., None, None], gates.total),
    )


def _weigh(x: Chunk, gates: Gates, sub: int) -> Float[Array, "*batch C C"]:
    """P: what each token takes of each value."""
    if gates.levels:
        scores = decay_halves.scores(x.q, x.k, gates.levels, sub)
    else:
        scores = _times(gates.pairs, x.q @ _transpose(x.k))
    return jnp.where(gates.seen, scores, 0.0)


def _only(mask: Bool[Array, "*any"], factor: Array | None) -> Array:
    return jnp.where(mask, 1.0 if factor is None else factor, 0.0)


def _times(factor: Array | None, x: Array) -> Array:
    return x if factor is None else factor * x


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
