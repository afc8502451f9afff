"""Norms, with statistics in float32.

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)    x / sqrt(mean(x^2) + eps) * scale
unit                                                        x / sqrt(sum(x^2) + eps)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.remat import recomputed
from lm.params import declare

UNIT_EPS = 1e-6


class RMSNorm(nn.Module):
    """Normalizes the last dimension, whose letter is `letter`; any leading shape."""

    context: Context
    letter: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = declare(nn.initializers.ones, self.letter, "vector", decay=False)
        scale = self.param("scale", init, (x.shape[-1],))
        dtype = self.context.numerics.compute_dtype

        @recomputed
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            normed = by_rms(x, (-1,), self.context.norm_eps) * scale.astype(jnp.float32)
            return normed.astype(dtype)

        return norm(x, scale)


def by_rms(x: jax.Array, axes: tuple[int, ...], eps: float) -> jax.Array:
    """x divided by its root mean square over `axes`, float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=axes, keepdims=True)
    return wide * jax.lax.rsqrt(mean_square + eps)


def unit(x: jax.Array) -> jax.Array:
    """x [..., K] divided by its Euclidean length, in x's dtype; a zero vector stays zero."""
    wide = x.astype(jnp.float32)
    length = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(length + UNIT_EPS)).astype(x.dtype)


def unit_keys(heads: jax.Array, key_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q and k [..., K] of unit length, and v, from SiLU(heads) [..., K + K + V]."""

    @recomputed
    def split(heads: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = jnp.split(jax.nn.silu(heads), [key_dim, 2 * key_dim], axis=-1)
        return unit(q), unit(k), v

    return split(heads)
