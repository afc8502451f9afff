"""Cosine: linear warmup, then half a cosine from the peak to final_ratio * peak (arXiv 1608.03983).

`horizon` is where the cosine ends, counted from the start of the run with the warmup. "100 percent"
is the usual schedule; a longer horizon cuts the cosine short (OLMo 2), a shorter one leaves a
constant floor. There is no stable phase, so no decay can branch from a checkpoint.

It equals optax.warmup_cosine_decay_schedule, whose `decay_steps` is the horizon; the tests compare
the two. optax counts steps and compiles its lengths in; here they are arguments.
"""

from __future__ import annotations

import dataclasses

from lm.schedules import Falling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Falling):
    @property
    def shape(self) -> str:
        return "cosine"
