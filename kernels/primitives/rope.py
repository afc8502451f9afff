"""Rotary position encoding (Su et al., arXiv 2104.09864, eq. 34), the halves of a head paired.

    angle_c = position * theta^(-2c/K)        c = 0 .. K/2 - 1
    (x_c, x_{c + K/2}) is turned by angle_c

Stretched for longer texts than it was trained on, each frequency f = theta^(-2c/K) becomes

    f / factor                                linear: Position Interpolation, arXiv 2306.15595
    f (s + (1 - s) / factor)                  Llama 3.1's: arXiv 2407.21783, sec. 3.4.1
        s = (original f / (2 pi) - low) / (high - low), cut to [0, 1]

Angles are float32 whatever the dtype of x. Pairing halves (as GPT-NeoX does) is another parameter
layout than pairing neighbours, though the same function up to a permutation of channels.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    *,
    theta: float = 10_000.0,
    scaling: tuple[float, ...] = (),
) -> Float[Array, "B T H K"]:
    """x turned by the angles of its positions; K must be even. `scaling`: (factor,) is linear,
    (factor, low, high, original) is Llama 3.1's.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(
            f"rope needs an even head width, got K={width}; set head_dim to a multiple of 2"
        )
    half = width // 2
    frequency = _stretched(theta ** (-jnp.arange(half, dtype=jnp.float32) / half), scaling)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)


def _stretched(frequency: Float[Array, " C"], scaling: tuple[float, ...]) -> Float[Array, " C"]:
    if not scaling:
        return frequency
    factor, *cuts = scaling
    if not cuts:
        return frequency / factor
    low, high, original = cuts
    turns = original * frequency / (2 * math.pi)  # within the length it was trained on
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / factor)
