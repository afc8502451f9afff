"""Sticks in log space: stable softplus, and sums along keys as small triangular products.

    softplus(z) = log(1 + e^z)           log(1 - sigmoid(z)) = -softplus(z)
    suffix(x)_j = sum_{l > j} x_l        prefix(x)_j = sum_{l <= j} x_l

A sum over n keys is done in runs of r: inside a run by one product with an [r, r] triangle of
ones, across runs by one with an [n/r, n/r] triangle. The plain forms are `jax.nn.softplus` and
`jnp.cumsum`. `suffix_rows` and `prefix_rows` sum along the first axis, inside of TPU kernels.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Above this softplus(z) = z in float32, and e^z stays far from overflow.
LINEAR = 60.0


def softplus_and_exp(
    z: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """softplus(z) and u = e^min(z, 60), from which sigmoid(z) = u / (1 + u)."""
    u = jnp.exp(jnp.minimum(z, LINEAR))
    # Where u is small, 1 + u rounds the digits of u away: four terms of the series keep them.
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - 0.25 * u)))
    logarithm = jnp.where(u < 0.015625, series, jnp.log(1.0 + u))
    return jnp.maximum(z, logarithm), u


def _run_sums(x: Float[Array, "*rows S"], triangle: np.ndarray) -> Float[Array, "*rows S"]:
    size = triangle.shape[0]
    runs = x.reshape(-1, size)
    sums = lax.dot(runs, jnp.asarray(triangle, x.dtype), precision=lax.Precision.HIGHEST)
    return sums.reshape(x.shape)


def suffix_sum(
    x: Float[Array, "*rows S"], run: int
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"]]:
    """Sum of what follows each key, and the sum of all keys; S is a multiple of `run`."""
    after = np.tril(np.ones((run, run)), -1)
    sums = _run_sums(x, after).reshape(*x.shape[:-1], -1, run)
    totals = sums[..., 0] + x.reshape(sums.shape)[..., 0]
    if sums.shape[-2] == 1:
        return sums[..., 0, :], totals[..., 0]
    number = totals.shape[-1]
    later = _run_sums(totals, np.tril(np.ones((number, number)), -1))
    sums = sums + later[..., None]
    return sums.reshape(x.shape), later[..., 0] + totals[..., 0]


def prefix_sum(
    x: Float[Array, "*rows S"], run: int
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"]]:
    """Sum up to and including each key, and the sum of all keys; S is a multiple of `run`."""
    sums = _run_sums(x, np.triu(np.ones((run, run)))).reshape(*x.shape[:-1], -1, run)
    totals = sums[..., -1]
    if sums.shape[-2] == 1:
        return sums[..., 0, :], totals[..., 0]
    number = totals.shape[-1]
    earlier = _run_sums(totals, np.triu(np.ones((number, number)), 1))
    sums = sums + earlier[..., None]
    return sums.reshape(x.shape), earlier[..., -1] + totals[..., -1]


# Keys to one product inside a TPU kernel: the side of its matrix unit.
_RUN = 128
# The bits of a float32 that bfloat16 has too: sign, exponent, seven digits.
_HIGH = -(2**16)


def suffix_rows(
    x: Float[Array, "S rows"], parts: int
) -> tuple[Float[Array, "S rows"], Float[Array, "1 rows"]]:
    """Sum of what follows each key, and the sum of all keys; S is a multiple of 128.

    The triangle is of ones, which bfloat16 holds exactly, so x is cut into `parts` numbers of
    eight digits each, of which each costs one pass: two leave an error of 2^-16, three none.
    """
    key, other = (lax.broadcasted_iota(jnp.int32, (_RUN, _RUN), axis) for axis in (0, 1))
    after = jnp.where(other > key, 1.0, 0.0).astype(jnp.bfloat16)
    total = jnp.zeros_like(x[:1])
    found: list[Array] = []
    for start in reversed(range(0, x.shape[0], _RUN)):
        run = x[start : start + _RUN]
        inside = _ones_times(after, run, parts)
        found.append(inside + total)
        total = total + inside[:1] + run[:1]
    return jnp.concatenate(found[::-1], axis=0), total


def prefix_rows(
    x: Float[Array, "S rows"], parts: int
) -> tuple[Float[Array, "S rows"], Float[Array, "1 rows"]]:
    """Sum up to and including each key, and the sum of all keys, as `suffix_rows`."""
    key, other = (lax.broadcasted_iota(jnp.int32, (_RUN, _RUN), axis) for axis in (0, 1))
    until = jnp.where(other <= key, 1.0, 0.0).astype(jnp.bfloat16)
    total = jnp.zeros_like(x[:1])
    found: list[Array] = []
    for start in range(0, x.shape[0], _RUN):
        found.append(_ones_times(until, x[start : start + _RUN], parts) + total)
        total = found[-1][-1:]
    return jnp.concatenate(found, axis=0), total


def _ones_times(
    ones: Float[Array, "S S"], x: Float[Array, "S rows"], parts: int
) -> Float[Array, "S rows"]:
    """ones @ x, smallest digits first."""
    pieces: list[Array] = []
    for _ in range(parts):
        # Bits are cut off because XLA may leave out a rounding to bfloat16 and back.
        bits = lax.bitcast_convert_type(x, jnp.int32) & _HIGH
        piece = lax.bitcast_convert_type(bits, jnp.float32)
        pieces.append(piece.astype(jnp.bfloat16))
        x = x - piece
    products = [
        lax.dot(ones, piece, preferred_element_type=jnp.float32) for piece in reversed(pieces)
    ]
    return sum(products[1:], start=products[0])
