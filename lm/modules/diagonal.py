"""A diagonal state-space model per channel (S4D; Gu et al. 2022, arXiv 2206.11893, section 3).

    h' = A h + x,  y = 2 Re(c . h) + D x        N / 2 modes a channel, A = -exp(log_a) + i frequency
    zero-order hold: lambda = exp(dt A), c_bar = c (exp(dt A) - 1) / A

A starts at -1/2 + i pi n (S4D-Lin), c as complex normal with variance one, log dt uniform between
log 0.001 and log 0.1. None of these has weight decay; B is folded into c.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.mixer import Along, Call
from lm.modules.step_size import log_dt
from lm.params import declare


class Diagonal(nn.Module):
    """x [..., H, K] -> the same shape, through the mixer's call `name`; `state_dim` N is even."""

    context: Context
    num_heads: int
    channels: int  # of each head
    state_dim: int

    @staticmethod
    def call(num_heads: int, channels: int, state_dim: int) -> Call:
        """The entry for this model in the mixer's `calls`."""
        dims = {"H": num_heads, "K": channels, "N": state_dim // 2}
        return Call("linear_scan", dims, {"transition": "modes"})

    def setup(self) -> None:
        heads = self.num_heads, self.channels
        modes = *heads, self.state_dim // 2

        def param(name: str, init: Any, letters: str, shape: tuple[int, ...]) -> jax.Array:
            return self.param(name, declare(init, letters, "vector", decay=False), shape)

        half = nn.initializers.constant(math.log(0.5))
        normal = nn.initializers.normal(math.sqrt(0.5))
        self.log_dt = param("log_dt", log_dt, "H K", heads)
        self.log_a = param("log_a", half, "H K N", modes)
        self.frequency = param("frequency", _harmonics, "H K N", modes)
        self.c_re = param("c_re", normal, "H K N", modes)
        self.c_im = param("c_im", normal, "H K N", modes)
        self.skip = param("D", nn.initializers.ones, "H K", heads)

    def __call__(self, x: jax.Array, run: Along, name: str) -> jax.Array:
        dt = jnp.exp(self.log_dt)[..., None]
        a_re, a_im = -jnp.exp(self.log_a), self.frequency
        magnitude, angle = dt * a_re, dt * a_im
        # (lambda - 1) / A as real pairs: multiply by the conjugate of A, divide by |A|^2. Where
        # dt A is small, lambda - 1 would lose its digits: cos a - 1 = -2 sin^2(a / 2) does not.
        top_re = jnp.expm1(magnitude) * jnp.cos(angle) - 2.0 * jnp.sin(0.5 * angle) ** 2
        top_im = jnp.exp(magnitude) * jnp.sin(angle)
        square = a_re * a_re + a_im * a_im
        b_re = (top_re * a_re + top_im * a_im) / square
        b_im = (top_im * a_re - top_re * a_im) / square
        inputs = {
            "x": x,
            "log_magnitude": magnitude,
            "angle": angle,
            "c_re": 2.0 * (self.c_re * b_re - self.c_im * b_im),
            "c_im": 2.0 * (self.c_re * b_im + self.c_im * b_re),
        }
        return run(name, inputs) + (self.skip * x).astype(x.dtype)


def _harmonics(key: jax.Array, shape: tuple[int, ...], *args: Any) -> jax.Array:
    del key, args
    return jnp.broadcast_to(math.pi * jnp.arange(shape[-1], dtype=jnp.float32), shape)
