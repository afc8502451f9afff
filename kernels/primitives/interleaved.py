"""Sums along keys inside a TPU kernel, made cheap by the order of the keys.

Keys run down the rows of a tile. In a run of 128 keys, row 8 r + s holds key 16 s + r:

    rows 0 .. 7      keys 0  16  32 ..  112
    rows 8 .. 15          1  17  33 ..  113    ..

A register holds 8 rows, so a run is 16 registers. Their rows s hold keys 16 s ... 16 s + 15, in
order. Adding the registers sums these 16 keys; only the sums of 16 keys are added across rows.

With keys in their natural order the sums would be products with triangles of ones, which need more
passes of the matrix unit than the attention itself. Keys are put in this order by a product with a
permutation matrix, which rounds nothing.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.primitives.products import Products

RUN = 128
_ROWS = 8
_LENGTH = RUN // _ROWS


def permutation() -> Float[Array, "128 128"]:
    """P[key, row] = 1 where the row holds the key."""
    key, row = (lax.broadcasted_iota(jnp.int32, (RUN, RUN), axis) for axis in (0, 1))
    held = (row & (_ROWS - 1)) * _LENGTH + (row >> 3)
    return jnp.where(key == held, 1.0, 0.0)


def order(x: Float[Array, "K S"], products: Products) -> Float[Array, "K S"]:
    """x with its columns in the order of a tile's rows; S is a multiple of 128."""
    ones = permutation()
    return _each_run(x, lambda run: products.nn(run, ones))


def restore(x: Float[Array, "K S"], products: Products) -> Float[Array, "K S"]:
    """The inverse of `order`."""
    ones = permutation()
    return _each_run(x, lambda run: products.nt(run, ones))


def _each_run(x: Array, change: Callable[[Array], Array]) -> Array:
    runs = [change(x[:, start : start + RUN]) for start in range(0, x.shape[1], RUN)]
    return jnp.concatenate(runs, axis=1).astype(x.dtype)


def order_ids(x: Int[Array, "*b S"]) -> Int[Array, "*b S"]:
    """The same order for integers; used outside of kernels."""
    runs = x.reshape(*x.shape[:-1], -1, _ROWS, _LENGTH)
    return runs.swapaxes(-1, -2).reshape(x.shape)


def keys(size: int, rows: int) -> Int[Array, "S rows"]:
    """The index of the key in every row of a tile."""
    shape = (size // RUN, _LENGTH, _ROWS, rows)
    run, late, early = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    return (run * RUN + early * _LENGTH + late).reshape(size, rows)


def suffix_sum(
    x: Float[Array, "S rows"], start: Float[Array, "1 rows"]
) -> tuple[Float[Array, "S rows"], Float[Array, "1 rows"]]:
    """For each key `start` plus the sum over later keys; and `start` plus the sum over all."""
    found: list[Array] = []
    for first in reversed(range(0, x.shape[0], RUN)):
        sums: list[Array] = []
        later = jnp.zeros_like(x[:_ROWS])
        for row in reversed(range(first, first + RUN, _ROWS)):
            sums.append(later)
            later = later + x[row : row + _ROWS]
        through = later
        for shift in (1, 2, 4):
            through = through + _up(through, shift)
        beyond = _up(through, 1) + start
        found += [here + beyond for here in sums]
        start = start + through[:1]
    return jnp.concatenate(found[::-1], axis=0), start


def prefix_sum(
    x: Float[Array, "S rows"], start: Float[Array, "1 rows"]
) -> tuple[Float[Array, "S rows"], Float[Array, "1 rows"]]:
    """For each key `start` plus the sum over earlier keys; and `start` plus the sum over all."""
    found: list[Array] = []
    for first in range(0, x.shape[0], RUN):
        sums: list[Array] = []
        until = jnp.zeros_like(x[:_ROWS])
        for row in range(first, first + RUN, _ROWS):
            sums.append(until)
            until = until + x[row : row + _ROWS]
        through = until
        for shift in (1, 2, 4):
            through = through + _down(through, shift)
        before = _down(through, 1) + start
        found += [here + before for here in sums]
        start = start + through[-1:]
    return jnp.concatenate(found, axis=0), start


def _up(x: Float[Array, "8 rows"], shift: int) -> Float[Array, "8 rows"]:
    return jnp.concatenate([x[shift:], jnp.zeros_like(x[:shift])], axis=0)


def _down(x: Float[Array, "8 rows"], shift: int) -> Float[Array, "8 rows"]:
    return jnp.concatenate([jnp.zeros_like(x[:shift]), x[:-shift]], axis=0)
