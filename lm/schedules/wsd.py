"""WSD: linear warmup, constant at the peak, decay (MiniCPM, arXiv 2404.06395).

`decay` is the length of the decay and `decay_shape` its shape; published lengths are 10 to 20
percent of the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from lm.schedules import Phased, Run, flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd(Phased):
    def stable(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        return flat(self.peak_learning_rate)
