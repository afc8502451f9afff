"""Scores of a chunk whose decay differs from channel to channel, computed by halving the chunk.

    A_ij = sum_k q_ik k_jk prod_{j < s <= i} a_sk        (i >= j; 0 above the diagonal), a = exp(g)

The product over s couples the three indices, so A is not a matrix product. But cut the chunk into
blocks of 2h tokens. For j in the first half of a block and i in its second half, the product splits
at the border between the halves into one factor for i and one for j:

    since_i = prod_{first token of i's half <= s <= i} a_s
    until_j = prod_{j < s <= last token of j's half} a_s

So the pairs of a level h are the matrix product (q since)(k until)^T. With h = C/2, C/4, ..., 1
every pair i > j belongs to exactly one level; the diagonal has no decay. Example: with C = 4, level
h = 2 holds the pairs of i in {2, 3} with j in {0, 1}, level h = 1 the pairs (1, 0) and (3, 2). This
is the secondary chunking of Yang et al. (arXiv 2312.06635, section 4.3), applied recursively.

The factors of a level follow from those of the level below by one multiplication. They are products
of decays, so at most one, and nothing is subtracted or divided: a decay of any strength neither
overflows nor cancels digits, and the same holds for the derivative by g. The factors of h = C decay
the state that enters the chunk, and the keys on their way to its end.

Levels within parts of `sub` tokens are computed for the whole part and masked, because products of
a few rows cost more than they save. C and `sub` are powers of two. With `sub` None the chunk is the
only part, and no array is cut below eight rows, as TPU kernels require.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.primitives import square
from kernels.primitives.products import Products


class Level(NamedTuple):
    """The factors in blocks of h tokens, or the cotangents of their logarithms."""

    since: Float[Array, "*batch C K"]
    until: Float[Array, "*batch C K"]


def levels(g: Float[Array, "*batch C K"], sub: int | None) -> tuple[Level, ...]:
    """The factors for h = 1, 2, 4, ..., C, computed from log decays."""
    decay = jnp.exp(g)
    found = [Level(decay, jnp.ones_like(decay))]
    while (size := 2 ** (len(found) - 1)) < g.shape[-2]:
        if sub is None:
            found.append(_double(found[-1], size))
            continue
        since, until = (_halve(x, size) for x in found[-1])
        first = since[..., 0, -1:, :]
        second = since[..., 1, -1:, :]
        found.append(
            Level(
                _unite(since[..., 0, :, :], since[..., 1, :, :] * first),
                _unite(until[..., 0, :, :] * second, until[..., 1, :, :]),
            )
        )
    return tuple(found)


def _double(factors: Level, size: int) -> Level:
    """The next level on whole arrays. The product over a half is the `since` of its last token."""
    since, until = factors
    is_second = (square.token(since) & size) != 0
    first = square.spread(since, size - 1, 2 * size)
    second = square.spread(since, 2 * size - 1, 2 * size)
    return Level(
        jnp.where(is_second, since * first, since), jnp.where(is_second, until, until * second)
    )


def pull(cotangents: list[Level], sub: int | None) -> Float[Array, "*batch C K"]:
    """The cotangent of g, from those of log since and log until for h = 1, 2, 4, ..., C."""
    since, until = cotangents[-1]
    for level, below in reversed(list(enumerate(cotangents[:-1]))):
        size = 2**level
        if sub is None:
            since = below.since + (since + _wholes(since, until, size))
            until = below.until + until
            continue
        d_since, d_until = _halve(since, size), _halve(until, size)
        # The product over a half is the `since` of its last token.
        first = jnp.sum(d_since[..., 1, :, :], axis=-2, keepdims=True)
        second = jnp.sum(d_until[..., 0, :, :], axis=-2, keepdims=True)
        last = lax.broadcasted_iota(jnp.int32, d_since.shape[-2:], 0) == size - 1
        since = below.since + _unite(
            d_since[..., 0, :, :] + jnp.where(last, first, 0.0),
            d_since[..., 1, :, :] + jnp.where(last, second, 0.0),
        )
        until = below.until + until
    return since


def _wholes(since: Array, until: Array, size: int) -> Float[Array, "*batch C K"]:
    """Cotangents of the log products over whole halves, placed at the halves' last tokens."""
    place = square.token(since) & (2 * size - 1)
    first = square.spread_sum(since, 1, size)
    second = square.spread_sum(until, 0, size)
    return jnp.where(place == size - 1, first, jnp.where(place == 2 * size - 1, second, 0.0))


def scores(
    q: Float[Array, "*batch C K"],
    k: Float[Array, "*batch C K"],
    factors: tuple[Level, ...],
    sub: int | None,
    products: Products,
) -> Float[Array, "*batch C C"]:
    """A, as defined in the module docstring."""
    length = q.shape[-2] if sub is None else sub
    q_part, k_part = _part(q, sub), _part(k, sub)
    near = jnp.sum(q_part * k_part, axis=-1, keepdims=True)
    parts = jnp.where(square.diagonal(length), near, 0.0)
    for level in range(_log2(length)):
        since, until = (_part(x, sub) for x in factors[level])
        product = products.nt(q_part * since, k_part * until)
        parts = parts + jnp.where(square.border(length, 2**level), product, 0.0)
    for level in range(_log2(length), len(factors) - 1):
        rows, columns = _sides(q, k, factors[level], 2**level)
        product = products.nt(rows, columns)
        blocks = parts.reshape(*parts.shape[:-3], -1, 2, *parts.shape[-2:])
        upper = jnp.concatenate([blocks[..., 0, :, :], jnp.zeros_like(product)], axis=-1)
        lower = jnp.concatenate([product, blocks[..., 1, :, :]], axis=-1)
        parts = jnp.concatenate([upper, lower], axis=-2)
    return parts if sub is None else parts[..., 0, :, :]


def cotangents(
    q: Float[Array, "*batch C K"],
    k: Float[Array, "*batch C K"],
    factors: tuple[Level, ...],
    d_scores: Float[Array, "*batch C C"],
    sub: int | None,
    products: Products,
) -> tuple[Array, Array, list[Level]]:
    """Cotangents of q, of k, and of the logarithms of the factors for h < C.

    With Q = q since and K = k until: dQ = dA K, dq = dQ since, dlog since = Q dQ; K is analogous.
    """
    length = q.shape[-2] if sub is None else sub
    on_diagonal = jnp.where(square.diagonal(d_scores.shape[-1]), d_scores, 0.0)
    d_near = jnp.sum(on_diagonal, axis=-1, keepdims=True)
    d_q, d_k = d_near * k, d_near * q
    found: list[Level] = []
    blocks = d_scores if sub is None else d_scores[..., None, :, :]
    for level in reversed(range(_log2(length), len(factors) - 1)):
        size = 2**level
        rows, columns = _sides(q, k, factors[level], size)
        since, until = _sides(factors[level].since, factors[level].until, None, size)
        blocks = blocks.reshape(*blocks.shape[:-2], 2, size, 2, size)
        d_product = blocks[..., 1, :, 0, :]
        d_rows = products.nn(d_product, columns)
        d_columns = products.tn(d_product, rows)
        none = jnp.zeros_like(d_rows)
        d_q = d_q + _unite(none, d_rows * since)
        d_k = d_k + _unite(d_columns * until, none)
        found.append(Level(_unite(none, rows * d_rows), _unite(columns * d_columns, none)))
        kept = jnp.stack([blocks[..., 0, :, 0, :], blocks[..., 1, :, 1, :]], axis=-3)
        blocks = kept.reshape(*kept.shape[:-4], -1, size, size)
    for level in reversed(range(_log2(length))):
        since, until = (_part(x, sub) for x in factors[level])
        rows, columns = _part(q, sub) * since, _part(k, sub) * until
        d_product = jnp.where(square.border(length, 2**level), blocks, 0.0)
        d_rows = products.nn(d_product, columns)
        d_columns = products.tn(d_product, rows)
        d_q = d_q + (d_rows * since).reshape(q.shape)
        d_k = d_k + (d_columns * until).reshape(k.shape)
        found.append(
            Level((rows * d_rows).reshape(q.shape), (columns * d_columns).reshape(k.shape))
        )
    return d_q, d_k, found[::-1]


def _sides(q: Array, k: Array, factors: Level | None, size: int) -> tuple[Array, Array]:
    """The second halves of q and the first halves of k, multiplied by their factors if given."""
    rows, columns = _halve(q, size)[..., 1, :, :], _halve(k, size)[..., 0, :, :]
    if factors is None:
        return rows, columns
    since, until = _sides(factors.since, factors.until, None, size)
    return rows * since, columns * until


def _log2(size: int) -> int:
    return size.bit_length() - 1


def _part(x: Float[Array, "*batch C K"], sub: int | None) -> Float[Array, "*batch P sub K"]:
    return x if sub is None else x.reshape(*x.shape[:-2], -1, sub, x.shape[-1])


def _halve(x: Float[Array, "*batch C K"], size: int) -> Float[Array, "*batch P 2 size K"]:
    return x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])


def _unite(
    first: Float[Array, "*batch P size K"], second: Float[Array, "*batch P size K"]
) -> Float[Array, "*batch C K"]:
    """The inverse of `_halve`."""
    x = jnp.stack([first, second], axis=-3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])
