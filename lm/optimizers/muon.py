"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum made orthogonal.

    m <- b m + (1 - b) g,  O = orthogonal factor of b m + (1 - b) g, by 5 Newton-Schulz steps
    w <- w - eta (scale O + wd w)

This is done for each layer's matrix between activations separately; its heads are among its columns
or rows. Embeddings, heads and vectors take Adam's step. `scale`:

    rms       0.2 sqrt(max(rows, columns)): entries as large as AdamW's usually are, so that one
              rate of AdamW works for both kinds (Liu et al. 2025, arXiv 2502.16982, section 2.2)
    spectral  sqrt(columns / rows), where rows are summed over: the rate is the relative change of a
              layer's output (Yang et al. 2023, arXiv 2310.17813; Jordan's has max(1, .) inside)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Annotated, Any, Literal

import jax
import optax
from optax import contrib

from lm.mapping import BELOW_ONE, POSITIVE
from lm.optimizers import Optimizer, unless_skipped
from lm.params import ParamInfo, is_info


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Its options, beside those of `Optimizer`.

    Attributes:
      momentum: decay of the momentum of matrices
      nesterov: whether the momentum looks one step ahead
      newton_schulz_steps: steps of the iteration that makes the momentum orthogonal
      scale: what the orthogonal factor is multiplied by (above)
      beta1: decay of the mean of gradients, in Adam's step of the rest
      beta2: decay of the mean of their squares, in Adam's step of the rest
      eps: added to the root of the second moment, in Adam's step of the rest
    """

    momentum: Annotated[float, BELOW_ONE] = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, POSITIVE] = 5
    scale: Literal["rms", "spectral"] = "rms"
    beta1: Annotated[float, BELOW_ONE] = 0.9
    beta2: Annotated[float, BELOW_ONE] = 0.95
    eps: Annotated[float, POSITIVE] = 1e-10

    @property
    def width_exponent(self) -> float:
        """The effect of a step's largest singular value, in a square matrix, must not depend on the
        width. That value is `scale`: the square root of the width (rms), or 1 (spectral).
        """
        return -0.5 if self.scale == "rms" else 0.0

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        of = lambda function: jax.tree.map(function, infos, is_leaf=is_info)
        muon = contrib.scale_by_muon(
            beta=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.newton_schulz_steps,
            weight_dimension_numbers=lambda _: of(_dimensions),
        )
        parts: dict[Hashable, optax.GradientTransformation] = {
            "muon": optax.chain(
                muon, optax.stateless(lambda updates, _: self._scaled(updates, infos))
            ),
            "adam": optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps),
        }
        return unless_skipped(
            optax.partition(parts, of(lambda i: "muon" if i.contracted else "adam"))
        )

    def _scaled(self, updates: Any, infos: Any) -> Any:
        return jax.tree.map(
            lambda info, u: self._scale_of(info) * u if info.contracted else u,
            infos,
            updates,
            is_leaf=is_info,
        )

    def _scale_of(self, info: ParamInfo) -> float:
        _, rows, columns = info.matrices
        if self.scale == "rms":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(columns / rows)


def _dimensions(info: ParamInfo) -> Any:
    """Which dimensions are rows and which are columns; each index of the others is a matrix."""
    if not info.contracted:
        return optax.MaskedNode()
    first = int(info.is_stacked)
    middle = first + info.contracted
    rows, columns = range(first, middle), range(middle, len(info.shape))
    return contrib.MuonDimensionNumbers(tuple(rows), tuple(columns))
