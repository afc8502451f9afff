"""One cycle: up along half a cosine, then down along another (Smith & Topin 2017, arXiv
1708.07120).

    eta(n) = peak (s + (1 - s) (1 - cos(pi n / Nr)) / 2)                   n < Nr
    eta(n) = peak (f + (1 - f) (1 + cos(pi (n - Nr) / (N - Nr))) / 2)      Nr <= n <= N, the run

`rise` is Nr; `start_ratio` s and `final_ratio` f are relative to the peak. The defaults are those
of optax.cosine_onecycle_schedule: 30 %, 1 / 25 and 1 / (25 * 10^4). That function takes one step at
a time and compiles its lengths in. So the half cosines here are optax.cosine_decay_schedule over a
length of one, and the tests compare the result with optax's.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lm.mapping import SHARE, Duration
from lm.schedules import Phases, Rule, Run, Schedule, inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneCycle(Rule):
    """Its options.

    Attributes:
      rise: length of the rise to the peak
      start_ratio: first rate over the peak
      final_ratio: last rate over the peak
    """

    rise: Duration = Duration(30, "percent")
    start_ratio: Annotated[float, SHARE] = 1 / 25
    final_ratio: Annotated[float, SHARE] = 1 / 25 / 1e4

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        rise = self.rise.tokens(**lengths)
        if rise >= run_tokens:
            return (
                f"schedule.rise={self.rise} takes {rise:.0f} tokens, run.length has {run_tokens}; "
                "shorten the rise"
            )
        return super().misfit(**lengths, is_branch=is_branch)

    def schedule(self, run: Run) -> Schedule:
        end = float(run.tokens)
        rise = self.rise.tokens(run_tokens=run.tokens, tokens_per_step=run.tokens_per_step)
        numbers = map(np.float32, (self.peak_learning_rate, self.start_ratio, self.final_ratio))
        return Schedule(
            # A rise that depends on the length of the run cannot continue at another length.
            phases=Phases(0.0, 0.0 if self.rise.unit == "percent" else rise, end),
            peak=self.peak_learning_rate,
            stable=Partial(_cycle, *numbers, np.float32(rise), inverse(rise), inverse(end - rise)),
            shape="cosine",
            final_ratio=self.final_ratio,
            is_whole=True,
        )


def _cycle(
    peak: Any, start: Any, final: Any, rise: Any, up: Any, down: Any, tokens: jax.Array
) -> jax.Array:
    half = optax.cosine_decay_schedule(1.0, 1)
    rising = 1.0 + (start - 1.0) * half(tokens * up)
    falling = final + (1.0 - final) * half(jnp.maximum(tokens - rise, 0.0) * down)
    return peak * jnp.where(tokens < rise, rising, falling)
