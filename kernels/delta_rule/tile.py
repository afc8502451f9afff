"""One chunk of the delta rule: C tokens at once, from the state S at its entry (WY or UT form).

With decay factors between tokens and to the borders of the chunk, each 0 where a document ends in
between (`Gates`), and unit lower triangular I + M:

    L_ij = between_ij k_i . k_j  (j < i)     M = diag(beta) L     A = (I + M)^-1
    N    = A beta (V - read (K S))           what the tokens write, [C, V]
    O    = read (Q S) + P N                  P_ij = between_ij q_i . k_j  (j <= i)
    S'   = through S + (write K)^T N

from Yang et al., arXiv 2406.06484, section 3.2, and 2412.06464, section 3.3, without W = A beta K:
A is applied once, after the state has been read. Backward, with R = V - read (K S):

    dN = P^T dO + (write K) dS'              dX = A^T dN         dR = dV = beta dX
    dP = dO N^T                              dM = -dX N^T        since d(A X) = A (dX - dM A X)
    dS = through dS' + (read Q)^T dO - (read K)^T dR

All is float32; q is scaled.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels.primitives import decay_span
from kernels.primitives.chunks import Documents

HIGHEST = lax.Precision.HIGHEST


class Memory(NamedTuple):
    """The state: per head a matrix that maps keys to values, and the document it belongs to."""

    s: Float[Array, "B H K V"]
    segment: Int[Array, " B"]


FIELDS = (("s", "B H K V"), ("segment", "B"))


class Tokens(NamedTuple):
    """The inputs of one chunk; `log_decay` None is no decay."""

    q: Float[Array, "*batch C K"]
    k: Float[Array, "*batch C K"]
    v: Float[Array, "*batch C V"]
    beta: Float[Array, "*batch C"]
    log_decay: Float[Array, "*batch C"] | None


class Gates(NamedTuple):
    """What is left of S at each token, of each token at the end, of S at the end, of j at i."""

    read: Float[Array, "*batch C"]
    write: Float[Array, "*batch C"]
    through: Float[Array, "*batch"]
    between: Float[Array, "*batch C C"]


class Inner(NamedTuple):
    """The products inside a chunk that forward and backward share."""

    gram: Float[Array, "*batch C C"]
    lower: Float[Array, "*batch C C"]
    weights: Float[Array, "*batch C C"]
    inverse: Float[Array, "*batch C C"]
    error: Float[Array, "*batch C V"]
    wrote: Float[Array, "*batch C V"]


def gates(
    log_decay: Float[Array, "*batch C"] | None, documents: Documents | None, length: int
) -> Gates:
    """The gates of one chunk; constants without decay and documents, which XLA then removes."""
    causal = np.tri(length, dtype=bool)
    if log_decay is None:
        ones = jnp.ones((length,))
        found = Gates(ones, ones, jnp.ones(()), jnp.asarray(causal, jnp.float32))
    else:
        start, span = jnp.cumsum(log_decay, axis=-1), decay_span.spans(log_decay)
        between = jnp.where(causal, jnp.exp(span), 0.0)
        found = Gates(jnp.exp(start), between[..., -1, :], jnp.exp(start[..., -1]), between)
    if documents is None:
        return found
    entry, last, same, through = (_per_head(mask) for mask in documents[:4])
    return Gates(
        jnp.where(entry, found.read, 0.0),
        jnp.where(last, found.write, 0.0),
        jnp.where(through, found.through, 0.0),
        jnp.where(same, found.between, 0.0),
    )


def forward(
    x: Tokens, gate: Gates, s: Float[Array, "*batch K V"], base: int
) -> tuple[Float[Array, "*batch C V"], Float[Array, "*batch K V"]]:
    """Output of the chunk and the state after it."""
    inner = _inner(x, gate, s, base)
    out = gate.read[..., None] * (x.q @ s) + inner.weights @ inner.wrote
    kept = gate.write[..., None] * x.k
    return out, gate.through[..., None, None] * s + _transposed(kept) @ inner.wrote


def backward(
    x: Tokens,
    gate: Gates,
    s: Float[Array, "*batch K V"],
    d_out: Float[Array, "*batch C V"],
    d_s: Float[Array, "*batch K V"],
    base: int,
) -> tuple[Tokens, Float[Array, "*batch K V"]]:
    """Cotangents of the chunk's inputs and of the state at its entry."""
    inner = _inner(x, gate, s, base)
    read, write, beta = gate.read[..., None], gate.write[..., None], x.beta[..., None]
    d_wrote = _transposed(inner.weights) @ d_out + (write * x.k) @ d_s
    d_x = _transposed(inner.inverse) @ d_wrote
    d_error = beta * d_x
    wrote_t, s_t = _transposed(inner.wrote), _transposed(s)
    # Entries above the diagonal are masked by the zeros of `between` and of `lower`'s mask.
    strict = np.tri(inner.gram.shape[-1], k=-1, dtype=bool)
    d_m = jnp.where(strict, -(d_x @ wrote_t), 0.0)
    d_weights = d_out @ wrote_t
    d_scores = gate.between * d_weights
    d_gram = gate.between * (beta * d_m)
    d_read_q = read * (d_out @ s_t)
    d_read_k = -read * (d_error @ s_t)
    d_write_k = write * (inner.wrote @ _transposed(d_s))
    d_q = d_read_q + d_scores @ x.k
    d_k = d_read_k + d_write_k + _transposed(d_scores) @ x.q
    d_k = d_k + (d_gram + _transposed(d_gram)) @ x.k
    d_beta = jnp.sum(d_x * inner.error, axis=-1) + jnp.sum(d_m * inner.lower, axis=-1)
    d_entry = gate.through[..., None, None] * d_s
    d_entry = d_entry + _transposed(read * x.q) @ d_out - _transposed(read * x.k) @ d_error
    d_decay = None
    if x.log_decay is not None:
        d_span = d_weights * inner.weights + beta * d_m * inner.lower
        d_start = jnp.sum(x.q * d_read_q + x.k * d_read_k, axis=-1)
        d_rest = jnp.sum(x.k * d_write_k, axis=-1)
        d_through = gate.through * jnp.sum(s * d_s, axis=(-1, -2))
        d_decay = decay_span.cotangent(d_span, d_start, d_rest, d_through)
    return Tokens(d_q, d_k, d_error, d_beta, d_decay), d_entry


def unit_inverse(m: Float[Array, "*batch C C"], base: int) -> Float[Array, "*batch C C"]:
    """(I + m)^-1 of strictly lower triangular m.

    Forward substitution in diagonal blocks of `base` rows, all at once, then pairs of blocks:

        [a  0]^-1   [   a^-1         0  ]
        [b  c]    = [-c^-1 b a^-1   c^-1]

    The series I - m + m^2 - ... would need only products, but for keys alike its terms grow to
    many orders of magnitude above their sum.
    """
    count = m.shape[-1] // base
    cut = [m[..., i * base : (i + 1) * base, i * base : (i + 1) * base] for i in range(count)]
    diagonal = _substitute(jnp.stack(cut, axis=-3))

    def merge(first: int, end: int) -> Array:
        if end - first == 1:
            return diagonal[..., first, :, :]
        middle = (first + end) // 2
        a, c = merge(first, middle), merge(middle, end)
        b = m[..., middle * base : end * base, first * base : middle * base]
        corner = -jnp.matmul(c, jnp.matmul(b, a, precision=HIGHEST), precision=HIGHEST)
        above = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, c.shape[-1])])
        return jnp.concatenate([above, jnp.concatenate([corner, c], axis=-1)], axis=-2)

    return merge(0, count)


def _substitute(m: Float[Array, "*batch R R"]) -> Float[Array, "*batch R R"]:
    """(I + m)^-1 row by row: when row j is final, what hangs on it is taken from the rows below."""

    def eliminate(j: Array, inverse: Array) -> Array:
        column = lax.dynamic_slice_in_dim(m, j, 1, axis=-1)
        return inverse - column * lax.dynamic_slice_in_dim(inverse, j, 1, axis=-2)

    size = m.shape[-1]
    return lax.fori_loop(0, size - 1, eliminate, jnp.broadcast_to(jnp.eye(size), m.shape))


def _inner(x: Tokens, gate: Gates, s: Array, base: int) -> Inner:
    k_t = _transposed(x.k)
    gram = jnp.matmul(x.k, k_t, precision=HIGHEST)
    strict = np.tri(gram.shape[-1], k=-1, dtype=bool)
    lower = jnp.where(strict, gate.between * gram, 0.0)
    weights = gate.between * (x.q @ k_t)
    beta = x.beta[..., None]
    inverse = unit_inverse(beta * lower, base)
    error = x.v - gate.read[..., None] * (x.k @ s)
    return Inner(gram, lower, weights, inverse, error, inverse @ (beta * error))


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _per_head(mask: Bool[Array, "B ..."]) -> Bool[Array, "B 1 ..."]:
    return mask[:, None]
