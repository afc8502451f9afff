"""A matrix of low rank R, x W_1 W_2 + b, as in the gates of GLA and (without b) of LightNet."""

from __future__ import annotations

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.linear import linear
from lm.params import declare


class LowRank(nn.Module):
    """x [..., D] -> [..., H, K] through R channels; the bias only if requested."""

    context: Context
    width: int
    rank: int
    letters: str  # of the output, e.g. "H K"
    shape: tuple[int, int]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        low = linear(self.context, "D R", (self.width, self.rank), 1, name="down")(x)
        shape = self.rank, *self.shape
        out = linear(self.context, f"R {self.letters}", shape, 1, name="up")(low)
        if not self.use_bias:
            return out
        init = declare(nn.initializers.zeros, self.letters, "vector", decay=False)
        bias = self.param("bias", init, self.shape)
        return out + bias.astype(out.dtype)
