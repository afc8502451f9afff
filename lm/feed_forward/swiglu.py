"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202, eq. 6), without biases:
(silu(x W_gate) * x W_up) W_down.
"""

from __future__ import annotations

from typing import Annotated

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lm.mapping import POSITIVE
from lm.modules.feed_forward import FeedForward
from lm.modules.linear import linear, project
from lm.modules.remat import recomputed


class Swiglu(FeedForward):
    """x [..., D] -> [..., D], through F hidden channels.

    Attributes:
      ffn_dim: width F; unset: the model's
    """

    ffn_dim: Annotated[int, POSITIVE]

    def setup(self) -> None:
        self.gate = linear(self.context, "D F", (self.width, self.ffn_dim), 1)
        self.up = linear(self.context, "D F", (self.width, self.ffn_dim), 1)
        self.down = linear(self.context, "F D", (self.ffn_dim, self.width), 1)

    def saved(self, length: int) -> dict[str, float]:
        return dict.fromkeys(
            ("mlp_gate", "mlp_up", "mlp"), 2.0 * self.width * self.ffn_dim * length
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = project(x, self.gate, self.up)
        gate = checkpoint_name(gate, "mlp_gate")
        return self.down(_gated(gate, checkpoint_name(up, "mlp_up")))


@recomputed
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up
