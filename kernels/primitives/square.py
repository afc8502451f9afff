"""Arrays over the pairs of a chunk's tokens: masks [C, C], rows [1, C] and columns [C, 1].

Everything is written in operations that lower inside a TPU kernel: masks come from iotas instead of
constants, a row becomes a column by a masked sum, rows are picked in groups of eight sublanes.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

SUBLANES = 8  # rows of a TPU's register: reshapes that cut inside a group of eight do not lower


def index(length: int, axis: int) -> Int[Array, "C C"]:
    """The index of each row (axis 0) or column (axis 1)."""
    return lax.broadcasted_iota(jnp.int32, (length, length), axis)


def lower(length: int) -> Bool[Array, "C C"]:
    """j <= i."""
    return index(length, 0) >= index(length, 1)


def below(length: int) -> Bool[Array, "C C"]:
    """j < i."""
    return index(length, 0) > index(length, 1)


def diagonal(length: int) -> Bool[Array, "C C"]:
    return index(length, 0) == index(length, 1)


def border(length: int, size: int) -> Bool[Array, "C C"]:
    """The pairs in one block of 2 `size` tokens (`size` a power of two) with i in its second half
    and j in its first: `size` is the highest bit in which they differ."""
    i, j = index(length, 0), index(length, 1)
    differ = i ^ j
    return (differ >= size) & (differ < 2 * size) & (i > j)


def to_column(row: Float[Array, "*batch 1 C"]) -> Float[Array, "*batch C 1"]:
    return jnp.sum(jnp.where(diagonal(row.shape[-1]), row, 0.0), axis=-1, keepdims=True)


def to_row(column: Float[Array, "*batch C 1"]) -> Float[Array, "*batch 1 C"]:
    return jnp.sum(jnp.where(diagonal(column.shape[-2]), column, 0.0), axis=-2, keepdims=True)


def token(x: Shaped[Array, "*batch C K"]) -> Int[Array, "C K"]:
    """The index of each row."""
    return lax.broadcasted_iota(jnp.int32, x.shape[-2:], 0)


def spread(x: Float[Array, "*batch C K"], at: int, block: int) -> Float[Array, "*batch C K"]:
    """Row `at` of every `block` rows, copied to all rows of its block."""
    rows = max(block, min(SUBLANES, x.shape[-2]))
    groups = x.reshape(*x.shape[:-2], -1, rows, x.shape[-1])
    number = lax.broadcasted_iota(jnp.int32, groups.shape[-2:], 0)
    found = groups[..., at : at + 1, :]
    for start in range(block, rows, block):
        here = groups[..., start + at : start + at + 1, :]
        found = jnp.where(number >= start, here, found)
    return jnp.broadcast_to(found, groups.shape).reshape(x.shape)


def spread_sum(x: Float[Array, "*batch C K"], half: int, size: int) -> Float[Array, "*batch C K"]:
    """The sum over one half (0 or 1) of every block of 2 `size` rows, copied to all its rows."""
    if 2 * size < SUBLANES:
        return sum(
            (spread(x, half * size + at, 2 * size) for at in range(1, size)),
            spread(x, half * size, 2 * size),
        )
    groups = x.reshape(*x.shape[:-2], -1, 2 * size, x.shape[-1])
    number = lax.broadcasted_iota(jnp.int32, groups.shape[-2:], 0)
    kept = jnp.where((number & size) == half * size, groups, 0.0)
    found = jnp.sum(kept, axis=-2, keepdims=True)
    return jnp.broadcast_to(found, groups.shape).reshape(x.shape)


def second(x: Float[Array, "*batch C K"], size: int) -> Float[Array, "*batch C/2 K"]:
    """The second halves of all blocks of 2 `size` rows, concatenated."""
    halves = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return halves[..., 1, :, :].reshape(*x.shape[:-2], -1, x.shape[-1])


def as_second(x: Float[Array, "*batch C/2 K"], size: int) -> Float[Array, "*batch C K"]:
    """The inverse of `second`, with zeros in the first halves."""
    halves = x.reshape(*x.shape[:-2], -1, size, x.shape[-1])
    both = jnp.stack([jnp.zeros_like(halves), halves], axis=-3)
    return both.reshape(*x.shape[:-2], -1, x.shape[-1])
