"""LARS (You et al. 2017, arXiv 1708.03888, algorithm 1): the gradient at the norm of the matrix.

    u = g + wd w,  v <- momentum v + c |w| / |u| u,  w <- w - eta v
                                                              |.| of each layer's matrix by itself

Vectors (norms, biases) take u as it is, and the ratio is 1 where a norm is 0 (optax [C]). The
momentum here averages steps before the rate is applied, so a schedule acts at once. The published
momentum averages steps after it, which is the same at a constant rate.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import optax

from lm.mapping import BELOW_ONE, POSITIVE
from lm.optimizers import Optimizer, add_decay, decay_mode_problem, unless_skipped
from lm.optimizers._layers import trust_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lars(Optimizer):
    """Its options, beside those of `Optimizer`.

    Attributes:
      momentum: decay of the momentum
      trust_coefficient: c, the norm of a step over the norm of the matrix, at a rate of 1
      nesterov: whether the momentum looks one step ahead
    """

    momentum: Annotated[float, BELOW_ONE] = 0.9
    trust_coefficient: Annotated[float, POSITIVE] = 0.001
    nesterov: bool = False

    decay_inside: ClassVar[bool] = True
    is_scale_free: ClassVar[bool] = False

    @property
    def width_exponent(self) -> float:
        """-1/2: for a gradient with few directions the norm is about its largest singular value,
        and here that norm is the matrix's, which grows as the square root of the width.
        """
        return -0.5

    def problem(self) -> str | None:
        return decay_mode_problem(self)

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        ratio = trust_ratio(infos, coefficient=self.trust_coefficient)
        momentum = optax.trace(decay=self.momentum, nesterov=self.nesterov)
        return unless_skipped(optax.chain(add_decay(infos), ratio, momentum))
