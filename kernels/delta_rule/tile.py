"""One chunk of the delta rule: C tokens at once, from the state S at its entry (WY or UT form).

`Gates` holds decay factors between tokens and to the borders of the chunk; a factor is 0 where a
document ends in between. With these and a unit lower triangular matrix I + M:

    L_ij = between_ij k_i . k_j  (j < i)     M = diag(beta) L     A = (I + M)^-1
    N    = A beta (V - read (K S))           what the tokens write, [C, V]
    O    = read (Q S) + P N                  P_ij = between_ij q_i . k_j  (j <= i)
    S'   = through S + (write K)^T N

This follows Yang et al., arXiv 2406.06484, section 3.2, and 2412.06464, section 3.3, but without
W = A beta K: A is applied once, after the state has been read. Backward, with R = V - read (K S):

    dN = P^T dO + (write K) dS'              dX = A^T dN         dR = dV = beta dX
    dP = dO N^T                              dM = -dX N^T        since d(A X) = A (dX - dM A X)
    dS = through dS' + (read Q)^T dO - (read K)^T dR

Everything is float32; q is already scaled.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.primitives import decay_span, square
from kernels.primitives.chunks import Documents
from kernels.primitives.products import EXACT, Products


class Memory(NamedTuple):
    """The state: for each head a matrix that maps keys to values, and the row's document."""

    s: Float[Array, "B H K V"]
    segment: Int[Array, " B"]


FIELDS = (("s", "B H K V"), ("segment", "B"))


class Tokens(NamedTuple):
    """The inputs of one chunk; `log_decay` None means no decay."""

    q: Float[Array, "*batch C K"]
    k: Float[Array, "*batch C K"]
    v: Float[Array, "*batch C V"]
    beta: Float[Array, "*batch 1 C"]
    log_decay: Float[Array, "*batch 1 C"] | None


class How(NamedTuple):
    """How matrices are multiplied: `products` in general, `solving` for products with the inverse
    (the inverse itself is computed exactly). `base` is the number of rows of the blocks where the
    inverse starts; None means `masked_inverse`."""

    products: Products
    solving: Products
    base: int | None


class Gates(NamedTuple):
    """How much remains: `read` of S at each token, `write` of each token's write at the chunk's
    end, `through` of S at the end, `between` of token j's write at token i."""

    read: Float[Array, "*batch C 1"]
    write: Float[Array, "*batch C 1"]
    through: Float[Array, "*batch 1 1"]
    between: Float[Array, "*batch C C"]


class Inner(NamedTuple):
    """What forward and backward share: beta as a column, and products within the chunk."""

    beta: Float[Array, "*batch C 1"]
    lower: Float[Array, "*batch C C"]
    weights: Float[Array, "*batch C C"]
    inverse: Float[Array, "*batch C C"]
    error: Float[Array, "*batch C V"]
    wrote: Float[Array, "*batch C V"]


def forward(
    x: Tokens, documents: Documents | None, s: Float[Array, "*batch K V"], how: How
) -> tuple[Float[Array, "*batch C V"], Float[Array, "*batch K V"]]:
    """Output of the chunk and the state after it."""
    gate, products = _gates(x, documents, how.products), how.products
    inner = _inner(x, gate, s, how)
    out = gate.read * products.nn(x.q, s) + products.nn(inner.weights, inner.wrote)
    return out, gate.through * s + products.tn(gate.write * x.k, inner.wrote)


def backward(
    x: Tokens,
    documents: Documents | None,
    s: Float[Array, "*batch K V"],
    d_out: Float[Array, "*batch C V"],
    d_s: Float[Array, "*batch K V"],
    how: How,
) -> tuple[Tokens, Float[Array, "*batch K V"]]:
    """Cotangents of the chunk's inputs and of the state at its entry."""
    gate, products = _gates(x, documents, how.products), how.products
    inner = _inner(x, gate, s, how)
    read, write, beta = gate.read, gate.write, inner.beta
    d_wrote = products.tn(inner.weights, d_out) + products.nn(write * x.k, d_s)
    d_x = how.solving.tn(inner.inverse, d_wrote)
    d_error = beta * d_x
    # Entries above the diagonal are masked by the zeros of `between` and by the mask of `lower`.
    d_m = jnp.where(square.below(beta.shape[-2]), -products.nt(d_x, inner.wrote), 0.0)
    d_weights = products.nt(d_out, inner.wrote)
    d_scores = gate.between * d_weights
    d_gram = gate.between * (beta * d_m)
    d_read_q = read * products.nt(d_out, s)
    d_read_k = -read * products.nt(d_error, s)
    d_write_k = write * products.nt(inner.wrote, d_s)
    d_q = d_read_q + products.nn(d_scores, x.k)
    d_k = d_read_k + d_write_k + products.tn(d_scores, x.q)
    d_k = d_k + products.nn(d_gram, x.k) + products.tn(d_gram, x.k)
    d_beta = jnp.sum(d_x * inner.error, axis=-1, keepdims=True)
    d_beta = d_beta + jnp.sum(d_m * inner.lower, axis=-1, keepdims=True)
    d_entry = gate.through * d_s
    d_entry = d_entry + products.tn(read * x.q, d_out) - products.tn(read * x.k, d_error)
    d_decay = None
    if x.log_decay is not None:
        d_span = d_weights * inner.weights + beta * d_m * inner.lower
        d_start = jnp.sum(x.q * d_read_q + x.k * d_read_k, axis=-1, keepdims=True)
        d_rest = jnp.sum(x.k * d_write_k, axis=-1, keepdims=True)
        d_through = gate.through * jnp.sum(s * d_s, axis=(-1, -2), keepdims=True)
        d_decay = decay_span.cotangent(d_span, d_start, d_rest, d_through, products)
    return Tokens(d_q, d_k, d_error, square.to_row(d_beta), d_decay), d_entry


def _gates(x: Tokens, documents: Documents | None, products: Products) -> Gates:
    """The gates of one chunk. Without decay and documents they are constants, which XLA removes."""
    length = x.q.shape[-2]
    causal = square.lower(length)
    if x.log_decay is None:
        ones = jnp.ones((length, 1))
        found = Gates(ones, ones, jnp.ones((1, 1)), causal.astype(jnp.float32))
    else:
        start, span = decay_span.start(x.log_decay), decay_span.spans(x.log_decay, products)
        between = jnp.where(causal, jnp.exp(span), 0.0)
        read = jnp.exp(start)
        found = Gates(read, jnp.exp(decay_span.rest(x.log_decay)), read[..., -1:, :], between)
    if documents is None:
        return found
    return Gates(
        jnp.where(documents.entry, found.read, 0.0),
        jnp.where(documents.last, found.write, 0.0),
        jnp.where(documents.through, found.through, 0.0),
        jnp.where(documents.same, found.between, 0.0),
    )


def unit_inverse(m: Float[Array, "*batch C C"], base: int) -> Float[Array, "*batch C C"]:
    """(I + m)^-1 for strictly lower triangular m.

    Diagonal blocks of `base` rows are inverted by forward substitution, all at once. Then pairs of
    neighboring blocks are merged:

        [a  0]^-1   [   a^-1         0  ]
        [b  c]    = [-c^-1 b a^-1   c^-1]

    The series I - m + m^2 - ... would need only products, but where keys are similar its terms
    become many orders of magnitude larger than its sum.
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
        corner = -EXACT.nn(c, EXACT.nn(b, a))
        above = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, c.shape[-1])])
        return jnp.concatenate([above, jnp.concatenate([corner, c], axis=-1)], axis=-2)

    return merge(0, count)


def _substitute(m: Float[Array, "*batch R R"]) -> Float[Array, "*batch R R"]:
    """(I + m)^-1 row by row: once row j is final, its multiples are subtracted from later rows."""

    def eliminate(j: Array, inverse: Array) -> Array:
        column = lax.dynamic_slice_in_dim(m, j, 1, axis=-1)
        return inverse - column * lax.dynamic_slice_in_dim(inverse, j, 1, axis=-2)

    size = m.shape[-1]
    return lax.fori_loop(0, size - 1, eliminate, jnp.broadcast_to(jnp.eye(size), m.shape))


def masked_inverse(m: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """The same with masks on whole matrices, which suits a matrix unit as wide as they are. It
    starts from blocks of eight rows (C is 8, 16, 32, ...) and merges all pairs of blocks at once.
    """
    length, size = m.shape[-1], square.SUBLANES
    row, column = square.index(length, 0), square.index(length, 1)
    inverse = jnp.broadcast_to(square.diagonal(length).astype(m.dtype), m.shape)
    for j in range(size - 1):
        here = column == (row & -size) + j
        factor = jnp.sum(jnp.where(here, m, 0.0), axis=-1, keepdims=True)
        inverse = inverse - factor * square.spread(inverse, j, size)
    while size < length:
        # Only rows of second halves change, so both products take half the rows.
        corner = square.second(jnp.where(square.border(length, size), m, 0.0), size)
        below = square.as_second(EXACT.nn(corner, inverse), size)
        change = EXACT.nn(square.second(inverse, size), below)
        inverse = inverse - square.as_second(change, size)
        size *= 2
    return inverse


def _inner(x: Tokens, gate: Gates, s: Array, how: How) -> Inner:
    products = how.products
    # bfloat16 keys are exact operands as they are.
    gram = (products if products.dtype == "bfloat16" else EXACT).nt(x.k, x.k)
    lower = jnp.where(square.below(gram.shape[-1]), gate.between * gram, 0.0)
    weights = gate.between * products.nt(x.q, x.k)
    beta = square.to_column(x.beta)
    m = beta * lower
    inverse = masked_inverse(m) if how.base is None else unit_inverse(m, how.base)
    error = x.v - gate.read * products.nn(x.k, s)
    return Inner(beta, lower, weights, inverse, error, how.solving.nn(inverse, beta * error))
