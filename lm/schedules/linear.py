"""Linear: linear warmup, then linearly to final_ratio * peak, by default to zero.

    eta(x) = peak (1 - x),   x = (n - Nw) / (horizon - Nw)

This is the worst-case-optimal schedule for the last iterate (Defazio et al. 2023, arXiv 2310.07831
[P]); they find it at least as good as a cosine on nearly all of their problems.

It equals optax.linear_schedule after a warmup; the tests compare the two. optax counts steps and
compiles its lengths in; here they are arguments.
"""

from __future__ import annotations

import dataclasses

from lm.schedules import Falling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Falling):
    @property
    def shape(self) -> str:
        return "linear"
