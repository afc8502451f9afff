"""RMSNorm (Zhang & Sennrich 2019, eq. 4): y = x / sqrt(mean(x^2) + eps) * scale, statistics in
float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.context import Context
from lm.params import declare


class RMSNorm(nn.Module):
    """Normalises the last dimension, whose letter is `letter`; any leading shape."""

    context: Context
    letter: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = declare(nn.initializers.ones, self.letter, "vector", decay=False)
        scale = self.param("scale", init, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (
            wide * jax.lax.rsqrt(mean_square + self.context.norm_eps) * scale.astype(jnp.float32)
        )
        return normed.astype(self.context.numerics.compute_dtype)
