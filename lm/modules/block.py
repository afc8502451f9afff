"""What every block is: one layer's mixer and feed-forward around the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.feed_forward import FeedForward
from lm.modules.losses import Losses


class Block(nn.Module):
    """`mixer` and `mlp` are unbound modules; without an mlp the block is the mixer alone. The two
    methods compute the same function: `__call__` on a span of time (training, or prefill when a
    state comes in), `step` on one token.
    """

    context: Context
    mixer: Any
    mlp: FeedForward | None

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; asked before any device is touched."""
        return None

    def flops(self, matrices: Mapping[str, int], length: int) -> float:
        """Model FLOPs of a forward pass over one row of `length` tokens. `matrices` maps the name
        of each part to the number of elements of its hidden matrices.
        """
        parts = {"mixer": self.mixer, "mlp": self.mlp}
        own = sum(2.0 * n * length for name, n in matrices.items() if name not in parts)
        inner = [part.flops(matrices.get(name, 0), length) for name, part in parts.items() if part]
        return own + sum(inner)

    def saved(self, length: int) -> dict[str, float]:
        """The part of these FLOPs that recomputation skips if model.kept names the tensor."""
        after = {} if self.mlp is None else self.mlp.saved(length)
        return {"op": self.mixer.op_flops(length)} | after

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, Losses]:
        """x [B, T, D]; `state` is None in training. Returns the layer's output, the mixer's state,
        and the losses of mixer and feed-forward.
        """
        raise NotImplementedError

    def step(self, x: jax.Array, positions: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """x [B, D], one token per row."""
        raise NotImplementedError
