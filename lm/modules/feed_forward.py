"""What every feed-forward is: x [..., D] -> [..., D], the same for each token by itself."""

from __future__ import annotations

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.losses import Losses


class FeedForward(nn.Module):
    """`width` is D. A field without a default that is a size of the model (ffn_dim) takes the
    model's unless the layer says otherwise.
    """

    context: Context
    width: int

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        return None

    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, Losses]:
        """x [..., D] -> [..., D]; or that, and what is added to the objective."""
        raise NotImplementedError
