"""Stick-breaking in log space: a stable softplus, and sums along keys as small triangular products.

    softplus(z) = log(1 + e^z)           log(1 - sigmoid(z)) = -softplus(z)
    suffix(x)_j = sum_{l > j} x_l        prefix(x)_j = sum_{l < j} x_l

A sum over n keys is done in runs of r keys: one product with an [r, r] triangle of ones inside the
runs, and one with an [n/r, n/r] triangle across runs. The plain forms are `jax.nn.softplus` and
`jnp.cumsum`.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Above this many bits log2(1 + 2^z) = z in float32, and 2^z is still far from overflow.
LINEAR = 120.0


def softplus_and_exp(
    z: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """softplus(z), and u = e^-|z| for `sigmoids`; neither overflows."""
    u = jnp.exp(-jnp.abs(z))
    # For a small u, 1 + u rounds its digits away; four terms of the series keep them.
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - 0.25 * u)))
    logarithm = jnp.where(u < 0.015625, series, jnp.log(1.0 + u))
    return jnp.maximum(z, 0.0) + logarithm, u


def sigmoids(
    z: Float[Array, "*shape"], u: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """sigmoid(z) and sigmoid(-z), both to full precision even where the other is nearly 1."""
    larger = 1.0 / (1.0 + u)
    smaller = u * larger
    return jnp.where(z < 0.0, smaller, larger), jnp.where(z < 0.0, larger, smaller)


def softplus_and_exp_in_bits(
    z: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """log2(1 + 2^z) and 2^min(z, 120). The absolute error of the first is 9e-8, even where its
    value is smaller than that; it takes a third of the operations of `softplus_and_exp`.
    """
    u = jnp.exp2(jnp.minimum(z, LINEAR))
    return jnp.maximum(z, jnp.log2(1.0 + u)), u


def _run_sums(x: Float[Array, "*rows S"], triangle: np.ndarray) -> Float[Array, "*rows S"]:
    size = triangle.shape[0]
    runs = x.reshape(-1, size)
    sums = lax.dot(runs, jnp.asarray(triangle, x.dtype), precision=lax.Precision.HIGHEST)
    return sums.reshape(x.shape)


def suffix_sum(
    x: Float[Array, "*rows S"], run: int
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"]]:
    """The sum over later keys for each key, and the sum over all; S is a multiple of `run`."""
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
    """The sum over earlier keys for each key, and the sum over all; S is a multiple of `run`."""
    sums = _run_sums(x, np.triu(np.ones((run, run)), 1)).reshape(*x.shape[:-1], -1, run)
    totals = sums[..., -1] + x.reshape(sums.shape)[..., -1]
    if sums.shape[-2] == 1:
        return sums[..., 0, :], totals[..., 0]
    number = totals.shape[-1]
    earlier = _run_sums(totals, np.triu(np.ones((number, number)), 1))
    sums = sums + earlier[..., None]
    return sums.reshape(x.shape), earlier[..., -1] + totals[..., -1]
