"""What every block is: one layer's mixer and feed-forward around the residual stream."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.feed_forward import FeedForward
from lm.modules.losses import Losses


class Block(nn.Module):
    """`mixer` and `mlp` are unbound modules (mlp None: the mixer alone). The two methods are one
    mathematics, on a span of time (training, or prefill when a state comes in) and on one token.
    """

    context: Context
    mixer: Any
    mlp: FeedForward | None

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        return None

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, Losses]:
        """x [B, T, D]; `state` None in training. Returns the layer's output, the mixer's state, and
        the losses of mixer and feed-forward.
        """
        raise NotImplementedError

    def step(self, x: jax.Array, positions: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """x [B, D], one token a row."""
        raise NotImplementedError
