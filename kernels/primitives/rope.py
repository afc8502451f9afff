"""Rotary position encoding (Su et al., arXiv 2104.09864, eq. 34), the halves of a head paired.

    angle_c = position * theta^(-2c/K)        c = 0 .. K/2 - 1
    (x_c, x_{c + K/2}) is turned by angle_c

Angles are float32 whatever the dtype of x. Pairing halves (as GPT-NeoX does) is another parameter
layout than pairing neighbours, though the same function up to a permutation of channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, theta: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """x turned by the angles of its positions; K must be even."""
    width = x.shape[-1]
    if width % 2:
        raise ValueError(
            f"rope needs an even head width, got K={width}; set head_dim to a multiple of 2"
        )
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)
