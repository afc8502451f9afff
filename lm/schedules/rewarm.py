"""Re-warm and re-decay: a run that continues the weights of another on other data (Ibrahim et
al. 2024, arXiv 2403.08763 [S]).

    eta(n) = peak (s + (1 - s) n / Nw)                         n < Nw: from where the other ended
    eta(n) = peak * fall((n - Nw) / (horizon - Nw))            then down again, by default a cosine

`start_ratio` s is the final rate of the previous run and `final_ratio` that of this run, both
relative to the peak; the defaults are a tenth each, as published (3e-4 to 3e-5). The length of the
warmup hardly mattered there (0 to 2 %). Moments were reset between datasets, as `init_from` does.
optax.linear_schedule and optax.cosine_decay_schedule are its two parts; the tests compare it with
them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lm.mapping import SHARE, Duration
from lm.schedules import Falling, Phases, Run, Schedule, inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarm(Falling):
    """Its options, beside those of `Falling`.

    Attributes:
      start_ratio: first rate over the peak
      decay_shape: how the rate falls after the warmup
    """

    warmup: Duration = Duration(1, "percent")
    start_ratio: Annotated[float, SHARE] = 0.1
    final_ratio: Annotated[float, SHARE] = 0.1
    decay_shape: Literal["cosine", "linear", "sqrt", "exponential"] = "cosine"

    @property
    def shape(self) -> str:
        return self.decay_shape

    def schedule(self, run: Run) -> Schedule:
        made = super().schedule(run)
        warmup_end, _, horizon = made.phases
        start = self.start_ratio if warmup_end >= 1 else 1.0
        numbers = (np.float32(start * self.peak_learning_rate), np.float32(self.peak_learning_rate))
        return dataclasses.replace(
            made,
            phases=Phases(0.0, warmup_end, horizon),
            stable=Partial(_rise, *numbers, inverse(warmup_end)),
        )


def _rise(start: Any, peak: Any, rate: Any, tokens: jax.Array) -> jax.Array:
    return start + (peak - start) * jnp.minimum(tokens * rate, 1.0)
