"""LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2): Adam's step at the norm of the matrix.

    u = Adam(g) + wd w,  w <- w - eta |w| / |u| u             |.| of each layer's matrix by itself

Vectors (norms, biases) take u as it is. The ratio is 1 where a norm is 0, and has no bound (optax's
phi is the identity [C]). The weight decay is inside the ratio: it turns a step and does not shrink
a matrix by eta wd. The published rates grow with the square root of the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import optax

from lm.mapping import BELOW_ONE, POSITIVE
from lm.optimizers import Optimizer, add_decay, decay_mode_problem, unless_skipped
from lm.optimizers._layers import trust_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lamb(Optimizer):
    """Its options, beside those of `Optimizer`.

    Attributes:
      beta1: decay of the mean of gradients
      beta2: decay of the mean of their squares
      eps: added to the root of the second moment
    """

    beta1: Annotated[float, BELOW_ONE] = 0.9
    beta2: Annotated[float, BELOW_ONE] = 0.999
    eps: Annotated[float, POSITIVE] = 1e-6

    decay_inside: ClassVar[bool] = True

    @property
    def width_exponent(self) -> float:
        """-1/2: the entries of a step have the size of the matrix's entries, which falls as the
        square root of the width, while Adam's have to fall in proportion to the width.
        """
        return -0.5

    def problem(self) -> str | None:
        return decay_mode_problem(self)

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        adam = optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)
        return unless_skipped(optax.chain(adam, add_decay(infos), trust_ratio(infos)))
