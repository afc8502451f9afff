"""Step: linear warmup, then the peak times a factor that changes at given points (DeepSeek LLM,
arXiv 2401.02954 [S]: warmup of 2,000 steps, 0.316 from 80 % of the tokens, 0.1 from 90 %).

    eta(n) = peak * min(n / Nw, 1) * factors[i],   at[i] <= n < at[i + 1]      (1 before at[0])

The rate at `at[i]` itself is already the new one. optax.piecewise_constant_schedule is the same
with scales that multiply. It takes its boundaries as the keys of a dict, which cannot be arguments
of a compiled step; the tests compare the two.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lm.mapping import Duration
from lm.schedules import Phases, Rule, Run, Schedule, inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Rule):
    """Its options.

    Attributes:
      warmup: length of the linear rise from 0
      at: where the rate jumps, in ascending order
      factors: rate over the peak from each of these places on
    """

    warmup: Duration = Duration(100_000, "tokens")
    at: tuple[Duration, ...] = (Duration(80, "percent"), Duration(90, "percent"))
    factors: tuple[float, ...] = (0.316, 0.1)
    is_continuous: ClassVar[bool] = False

    def problem(self) -> str | None:
        if not self.at or len(self.at) != len(self.factors):
            return f"at has {len(self.at)} points and factors {len(self.factors)}; set as many"
        if not all(0.0 <= x <= 1.0 for x in self.factors):
            return f"factors={list(self.factors)} must lie in [0, 1], each in the peak"
        return None

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        places = [self.warmup, *self.at]
        for before, after in itertools.pairwise(places):
            if before.tokens(**lengths) >= after.tokens(**lengths):
                return (
                    f"schedule.at: {after} does not come after {before}; set increasing points "
                    f"after schedule.warmup={self.warmup}"
                )
        return super().misfit(**lengths, is_branch=is_branch)

    def schedule(self, run: Run) -> Schedule:
        lengths = {"run_tokens": run.tokens, "tokens_per_step": run.tokens_per_step}
        warmup_end = self.warmup.tokens(**lengths)
        places = [x.tokens(**lengths) for x in self.at]
        rates = np.array([1.0, *self.factors]) * self.peak_learning_rate
        # The last step before the first change of the rate.
        start = (math.ceil(places[0] / run.tokens_per_step - 1e-6) - 1) * run.tokens_per_step
        ramp = (inverse(warmup_end), np.float32(warmup_end < 1))
        return Schedule(
            phases=Phases(warmup_end, max(float(start), warmup_end), places[-1]),
            peak=self.peak_learning_rate,
            stable=Partial(
                _stairs, rates.astype(np.float32), np.asarray(places, np.float32), *ramp
            ),
            shape="linear",
            final_ratio=0.0,
            is_whole=True,
        )


def _stairs(rates: Any, places: Any, warmup_rate: Any, first: Any, tokens: jax.Array) -> jax.Array:
    rate = jnp.full_like(tokens, rates[0])
    for i in range(len(places)):
        rate = jnp.where(tokens >= places[i], rates[i + 1], rate)
    return rate * jnp.minimum(tokens * warmup_rate + first, 1.0)
