"""Rotary position encoding (Su et al., arXiv 2104.09864, eq. 34). Channels c, c + K/2 are a pair.

    angle_c = position * theta^(-2c/K)        c = 0 .. K/2 - 1
    (x_c, x_{c + K/2}) is rotated by angle_c

For texts longer than those of training, each frequency f = theta^(-2c/K) becomes

    f / factor                                linear: Position Interpolation, arXiv 2306.15595
    f (s + (1 - s) / factor)                  Llama 3.1's: arXiv 2407.21783, sec. 3.4.1
        s = (original f / (2 pi) - low) / (high - low), clipped to [0, 1]

Angles are float32 whatever the dtype of x. Pairing the halves of a head (as GPT-NeoX does) is a
different parameter layout from pairing neighbors, but the same function up to a permutation of
channels.
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
    """x rotated by the angles of its positions. `scaling` (factor,) is linear, (factor, low, high,
    original) is Llama 3.1's, and () is none.

    Raises:
      ValueError: K is odd.
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
    turns = original * frequency / (2 * math.pi)  # full turns within the training length
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / factor)
