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

    def flops(self, matrices: int, length: int) -> float:
        """Model FLOPs of a forward pass over one row of `length` tokens. `matrices`: elements of
        its hidden matrices, all of which every token is multiplied with, unless a feed-forward says
        otherwise (of many experts a token passes through few).
        """
        return 2.0 * matrices * length

    def saved(self, length: int) -> dict[str, float]:
        """Of these FLOPs, those that need not be done again where model.kept names a tensor."""
        return {}

    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, Losses]:
        """x [..., D] -> [..., D]; or that, and what is added to the objective."""
        raise NotImplementedError
