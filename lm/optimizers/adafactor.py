"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4, 5): row and column moments.

    R <- b_t R + (1 - b_t) mean_columns(g^2 + eps),  C likewise of rows,  b_t = 1 - t^-decay_power
    u = g / sqrt(R C / mean(R)),  u <- u / max(1, rms(u) / clip),  w <- w - eta max(1e-3, rms(w)) u

This is done for each layer's matrix separately; its heads are among its columns or rows. An
embedding is such a matrix too; a vector has a moment for every element. The state is one number per
row and column, whole on every device. `relative` is the factor rms(w). `momentum` 0, as published,
keeps no momentum.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import optax

from lm.mapping import BELOW_ONE, POSITIVE
from lm.optimizers import Optimizer, unless_skipped
from lm.optimizers._layers import per_layer
from lm.params import ParamInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Its options, beside those of `Optimizer`.

    Attributes:
      decay_power: 1 - t^-decay_power is the decay of the moments at step t
      eps: added to squared gradients
      clip: largest root mean square of an update
      relative: whether an update is multiplied by the root mean square of its parameter
      momentum: decay of a momentum of updates; 0: none is kept
    """

    decay_power: Annotated[float, POSITIVE] = 0.8
    eps: Annotated[float, POSITIVE] = 1e-30
    clip: Annotated[float, POSITIVE] = 1.0
    relative: bool = True
    momentum: Annotated[float, BELOW_ONE] = 0.0

    @property
    def width_exponent(self) -> float:
        """Adam's -1. A relative step already contains the size of the matrix's entries, which falls
        as the square root of the width, so -1/2 remains.
        """
        return -0.5 if self.relative else -1.0

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        parts = [per_layer(self._of_matrix, infos)]
        if self.momentum:
            parts.append(optax.ema(self.momentum, debias=False))
        return unless_skipped(optax.chain(*parts))

    def _of_matrix(self, info: ParamInfo) -> optax.GradientTransformation:
        moments = optax.scale_by_factored_rms(
            factored=info.role != "vector",
            decay_rate=self.decay_power,
            min_dim_size_to_factor=1,
            epsilon=self.eps,
        )
        parts = [moments, optax.clip_by_block_rms(self.clip)]
        return optax.chain(*parts, *[optax.scale_by_param_block_rms()] * self.relative)
