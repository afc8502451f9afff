"""Cosine: linear warmup, then half a cosine from the peak to final_ratio * peak (arXiv 1608.03983).

`horizon` is where the cosine ends, counted from the start of the run, warmup included. "100
percent" is the usual schedule, a longer horizon cuts the cosine short (OLMo 2), a shorter one
leaves a constant floor. There is no stable phase, hence no decay that branches from a checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from lm.mapping import SHARE, Duration
from lm.schedules import Phases, Rule, Run, Schedule, constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Rule):
    warmup: Duration = Duration(100_000, "tokens")
    horizon: Duration = Duration(100, "percent")
    final_ratio: Annotated[float, SHARE] = 0.0

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        warmup_end, horizon = self.warmup.tokens(**lengths), self.horizon.tokens(**lengths)
        if horizon <= warmup_end:
            return (
                f"schedule.horizon={self.horizon} ends the cosine at {horizon:.0f} tokens, within "
                f"schedule.warmup={self.warmup} of {warmup_end:.0f}; set a longer horizon or a "
                "shorter warmup"
            )
        return super().misfit(**lengths, is_branch=is_branch)

    def schedule(self, run: Run) -> Schedule:
        lengths = {"run_tokens": run.tokens, "tokens_per_step": run.tokens_per_step}
        warmup_end, horizon = self.warmup.tokens(**lengths), self.horizon.tokens(**lengths)
        return Schedule(
            phases=Phases(warmup_end, warmup_end, horizon),
            peak=self.peak_learning_rate,
            stable=constant(self.peak_learning_rate),
            shape="cosine",
            final_ratio=self.final_ratio,
        )
