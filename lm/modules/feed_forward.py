"""What every feed-forward is: x [..., D] -> [..., D], the same function for each token."""

from __future__ import annotations

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.losses import Losses


class FeedForward(nn.Module):
    """`width` is D. A field without a default that is a size of the model (ffn_dim) takes the
    model's value unless the layer sets another.
    """

    context: Context
    width: int

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; asked before any device is touched."""
        return None

    def flops(self, matrices: int, length: int) -> float:
        """Model FLOPs of a forward pass over one row of `length` tokens. `matrices` is the number
        of elements of its hidden matrices. Every token is multiplied with all of them, unless a
        subclass says otherwise (with many experts a token passes through few).
        """
        return 2.0 * matrices * length

    def saved(self, length: int) -> dict[str, float]:
        """The part of these FLOPs that recomputation skips if model.kept names the tensor."""
        return {}

    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, Losses]:
        """x [..., D] -> [..., D]; or that, and losses to add to the objective."""
        raise NotImplementedError
