"""Learning rates as functions of tokens seen; one file per schedule, found by listing this folder.

A file holds one frozen dataclass, named like the file in camel case, which derives from `Rule`, or
from `Phased` (warmup, stable phase, decay) or `Falling` (warmup, decay). Its fields with defaults
are its options. `schedule(run)` is the learning rate for a run of a given length. Tokens are
counted before the update: the first step sees 0. Only calling a schedule touches a device.
"""

from __future__ import annotations

from lm.schedules._rule import Falling, Phased, Rule, branch_tokens
from lm.schedules._schedule import Curve, Fall, Phases, Run, Schedule, flat, inverse

__all__ = [
    "Curve",
    "Fall",
    "Falling",
    "Phased",
    "Phases",
    "Rule",
    "Run",
    "Schedule",
    "branch_tokens",
    "flat",
    "inverse",
]
