"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202, eq. 6): (silu(x W_gate) * x W_up) W_down, no
biases.
"""

from __future__ import annotations

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lm.modules.context import Context
from lm.modules.linear import Linear, project
from lm.modules.remat import recomputed


class SwiGLU(nn.Module):
    """x [..., D] -> [..., D] through F."""

    context: Context
    width: int
    ffn_dim: int

    def setup(self) -> None:
        self.gate = Linear(self.context, "D F", (self.width, self.ffn_dim), 1)
        self.up = Linear(self.context, "D F", (self.width, self.ffn_dim), 1)
        self.down = Linear(self.context, "F D", (self.ffn_dim, self.width), 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = project(x, self.gate, self.up)
        gate = checkpoint_name(gate, "mlp_gate")
        return self.down(_gated(gate, checkpoint_name(up, "mlp_up")))


@recomputed
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up
