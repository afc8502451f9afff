"""One layer: pre-norm, sequence mixer, residual; pre-norm, feed-forward, residual.

Both branches carry muP's residual multiplier.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from lm.modules.block import Block
from lm.modules.losses import Losses, together
from lm.modules.norm import RMSNorm


class PreNorm(Block):
    """Mixer and feed-forward each have a norm in front; the residual stream is never normed."""

    def setup(self) -> None:
        self.mixer_norm = RMSNorm(self.context)
        if self.mlp is not None:
            self.mlp_norm = RMSNorm(self.context)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, Losses]:
        x = checkpoint_name(x, "stream")
        normed = self.context.place(self.mixer_norm(x), "B T D")
        normed = checkpoint_name(normed, "mixer_norm")
        mixed, state, losses = self.mixer.span(normed, segment_ids, positions, state)
        x, others = self._feed_forward(x + self._scaled(checkpoint_name(mixed, "mixer")))
        return x, state, together([losses, others])

    def step(self, x: jax.Array, positions: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        mixed, state = self.mixer.step(self.mixer_norm(x), positions, state)
        return self._feed_forward(x + self._scaled(mixed))[0], state

    def _feed_forward(self, x: jax.Array) -> tuple[jax.Array, Losses]:
        if self.mlp is None:
            return x, {}
        out = self.mlp(checkpoint_name(self.context.place(self.mlp_norm(x), "B T D"), "mlp_norm"))
        out, losses = out if isinstance(out, tuple) else (out, {})
        return x + self._scaled(checkpoint_name(out, "mlp")), losses

    def _scaled(self, branch: jax.Array) -> jax.Array:
        return branch * self.context.multipliers.residual
