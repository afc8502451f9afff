"""Infinite: warmup, cooldown to a rate that stays constant for any length, and an anneal from any
point of it (Ibrahim et al. 2024, arXiv 2403.08763; arXiv 2503.02844).

    cooldown: eta(x) = peak + (constant - peak) h(x) / h(1),   x = (n - Nw) / Nc
        cosine         h(x) = (1 - cos(pi x)) / 2
        inverse_sqrt   h(x) = 1 / sqrt(1 + alpha x) - 1
    anneal:   `decay` of Phased, by default geometric, constant (final / constant)^x

Published for 405M parameters [S]: peak 3e-4, constant 1.65e-4 (0.55 of the peak), final 3e-5, a
warmup of 1 % and a cooldown of 60 % of the iterations. alpha = 10 and an anneal over the last 25 %
are UNCONFIRMED. `final_ratio` is relative to the constant rate, as for every decay.

Give warmup and cooldown in steps or tokens: then nothing before the anneal depends on the length of
the run, and the run can be extended or branched from at any time. The anneal is
optax.exponential_decay (_schedule.py); optax has no inverse square root to a constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lm.mapping import SHARE, Bound, Duration, UserError
from lm.schedules import Phased, Run, Schedule, flat, inverse
from lm.schedules._rule import Shape

BENT = Bound("must lie in [0.01, 1000]", lambda x: 0.01 <= x <= 1000.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infinite(Phased):
    """Its options, beside those of `Phased`, whose decay is the anneal.

    Attributes:
      cooldown: length of the fall from the peak to the constant rate
      cooldown_shape: how the rate falls in the cooldown
      constant_ratio: constant rate over the peak
      alpha: bend of the inverse square root in the cooldown
    """

    cooldown: Duration = Duration(500_000, "tokens")
    cooldown_shape: Literal["cosine", "inverse_sqrt"] = "cosine"
    constant_ratio: Annotated[float, SHARE] = 0.55
    alpha: Annotated[float, BENT] = 10.0
    decay: Duration = Duration(25, "percent")
    decay_shape: Shape = "geometric"
    final_ratio: Annotated[float, SHARE] = 3e-5 / 1.65e-4

    def problem(self) -> str | None:
        if self.constant_ratio == 0:
            return "constant_ratio=0.0 leaves no constant phase; set constant_ratio=0.55"
        return super().problem()

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        problem = super().misfit(**lengths, is_branch=is_branch)
        if problem is not None or is_branch:
            return problem
        taken = sum(x.tokens(**lengths) for x in (self.warmup, self.cooldown, self.decay))
        if taken <= run_tokens:
            return None
        return (
            f"schedule.warmup={self.warmup}, schedule.cooldown={self.cooldown} and "
            f"schedule.decay={self.decay} take {taken:.0f} tokens, run.length has {run_tokens}; "
            "shorten the cooldown or lengthen the run"
        )

    def schedule(self, run: Run) -> Schedule:
        made = super().schedule(run)
        warmup_end, cooldown = self._lengths(run)
        if run.decay_start is not None and run.decay_start < warmup_end + cooldown:
            raise UserError(
                f"decay_from has seen {run.decay_start:.0f} tokens, schedule.cooldown="
                f"{self.cooldown} ends at {warmup_end + cooldown:.0f}; branch from a later "
                "checkpoint"
            )
        return made

    def stable(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        warmup_end, cooldown = self._lengths(run)
        low = np.float32(self.constant_ratio * self.peak_learning_rate)
        numbers = (np.float32(self.peak_learning_rate), low, np.float32(warmup_end))
        if cooldown < 1:
            return flat(float(low))
        if self.cooldown_shape == "cosine":
            return Partial(_cosine, *numbers, inverse(cooldown))
        scale = 1.0 / (1.0 / math.sqrt(1.0 + self.alpha) - 1.0)
        return Partial(
            _inverse_sqrt, *numbers, inverse(cooldown), np.float32(self.alpha), np.float32(scale)
        )

    def _lengths(self, run: Run) -> tuple[float, float]:
        lengths = {"run_tokens": run.tokens, "tokens_per_step": run.tokens_per_step}
        return self.warmup.tokens(**lengths), self.cooldown.tokens(**lengths)


def _cosine(peak: Any, low: Any, start: Any, rate: Any, tokens: jax.Array) -> jax.Array:
    x = jnp.clip((tokens - start) * rate, 0.0, 1.0)
    return peak + (low - peak) * jnp.square(jnp.sin(x * np.float32(math.pi / 2)))


def _inverse_sqrt(
    peak: Any, low: Any, start: Any, rate: Any, alpha: Any, scale: Any, tokens: jax.Array
) -> jax.Array:
    x = jnp.clip((tokens - start) * rate, 0.0, 1.0)
    return peak + (low - peak) * jnp.minimum(jnp.expm1(-0.5 * jnp.log1p(alpha * x)) * scale, 1.0)
