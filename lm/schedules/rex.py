"""REX: linear warmup, then a fall that is late and steep (Chen et al. 2021, arXiv 2107.04197).

    eta(x) = peak (1 - x) / ((1 - d) + d (1 - x)),   x = (n - Nw) / (horizon - Nw)

d = 1/2 is the paper's value (UNCONFIRMED against its text), 0.9 is that of a widely copied
implementation [C], and 0 gives a linear fall. With `final_ratio` r the rate is
peak (r + (1 - r) eta(x) / peak). optax does not have such a schedule.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import numpy as np

from lm.mapping import BELOW_ONE
from lm.schedules import Fall, Falling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rex(Falling):
    """Its options, beside those of `Falling`.

    Attributes:
      d: bend of the fall; 0 is linear
    """

    d: Annotated[float, BELOW_ONE] = 0.5

    @property
    def shape(self) -> Fall:
        return _Fall(self.d)


@dataclasses.dataclass(frozen=True)
class _Fall:
    d: float

    def __call__(self, x: jax.Array, final_ratio: float) -> jax.Array:
        left = 1.0 - x
        factor = left / (np.float32(1.0 - self.d) + np.float32(self.d) * left)
        return np.float32(final_ratio) + np.float32(1.0 - final_ratio) * factor
