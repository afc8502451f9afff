"""Constant: linear warmup, then the peak for as long as the run lasts.

This is the simplest trunk: another run with schedule.family=wsd and decay_from can decay from any
of its checkpoints. It equals optax.constant_schedule after a warmup; that function returns a Python
number whatever its argument, so there is nothing to wrap.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lm.mapping import Duration
from lm.schedules import Phases, Rule, Run, Schedule, flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Rule):
    """Its options.

    Attributes:
      warmup: length of the linear rise from 0
    """

    warmup: Duration = Duration(100_000, "tokens")
    has_stable_phase: ClassVar[bool] = True

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        if is_branch:
            return (
                "decay_from with schedule.family='constant', which never decays; set another family"
            )
        warmup_end = self.warmup.tokens(**lengths)
        if warmup_end > run_tokens:
            return (
                f"schedule.warmup={self.warmup} takes {warmup_end:.0f} tokens, run.length has "
                f"{run_tokens}; shorten the warmup"
            )
        return None

    def schedule(self, run: Run) -> Schedule:
        warmup_end = self.warmup.tokens(run_tokens=run.tokens, tokens_per_step=run.tokens_per_step)
        return Schedule(
            phases=Phases(warmup_end, float(run.tokens), float(run.tokens)),
            peak=self.peak_learning_rate,
            stable=flat(self.peak_learning_rate),
            shape="linear",
            final_ratio=1.0,
        )
