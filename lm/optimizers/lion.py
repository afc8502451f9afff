"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum.

    u = sign(b1 m + (1 - b1) g),  m <- b2 m + (1 - b2) g,  w <- w - eta (u + wd w)

Every entry moves by the rate, as in Adam's first step, so the rate depends on the width as Adam's
does. Published with rates 3 to 10 times smaller than AdamW's, and a weight decay that many times
larger.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import optax

from lm.mapping import BELOW_ONE
from lm.optimizers import Optimizer, unless_skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Its options, beside those of `Optimizer`.

    Attributes:
      beta1: share of the momentum in the interpolation whose sign is taken
      beta2: decay of the momentum
    """

    beta1: Annotated[float, BELOW_ONE] = 0.9
    beta2: Annotated[float, BELOW_ONE] = 0.99

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        return unless_skipped(optax.scale_by_lion(b1=self.beta1, b2=self.beta2))
