"""Short causal convolution of projected heads, as in front of the op of DeltaNet and Mamba-2.

y_t = bias + sum_w weight_w x_{t-W+1+w}        per channel, and never across documents
"""

from __future__ import annotations

import math

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.mixer import Along, Call
from lm.params import declare


class ShortConv(nn.Module):
    """x [..., H, K] -> the same shape, through the mixer's call `name`; no activation."""

    context: Context
    num_heads: int
    channels: int  # of each head
    taps: int
    use_bias: bool = False
    letter: str = "H"  # the letter of the heads

    def setup(self) -> None:
        # The initial bound of torch's convolutions: one over the square root of the fan-in.
        bound = 1.0 / math.sqrt(self.taps)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        shape = self.num_heads, self.channels, self.taps
        self.weight = self.param(
            "weight", declare(uniform, f"{self.letter} K W", "vector", decay=True), shape
        )
        if self.use_bias:
            init = declare(nn.initializers.zeros, f"{self.letter} K", "vector", decay=False)
            self.bias = self.param("bias", init, shape[:2])

    @staticmethod
    def call(num_heads: int, channels: int, taps: int, *, use_bias: bool = False) -> Call:
        """The entry for this convolution in the mixer's `calls`."""
        return Call(
            "gated_conv",
            {"H": num_heads, "K": channels, "W": taps},
            {"bias": use_bias, "gate": False},
        )

    def __call__(self, x: jax.Array, run: Along, name: str) -> jax.Array:
        inputs = {"x": x, "weight": self.weight}
        return run(name, inputs | ({"bias": self.bias} if self.use_bias else {}))
