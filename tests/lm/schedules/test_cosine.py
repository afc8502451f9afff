"""Cosine equals optax's."""

import numpy as np
import optax

from lm.families import SCHEDULES
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "cosine"} | options, "schedule").schedule(Run(TOKENS, 1000))


def test_cosine_equals_optax() -> None:
    schedule = create(peak_learning_rate=0.01, warmup="100 steps", final_ratio=0.1)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.01, 100, 1000, 0.001)
    for step in (0, 50, 100, 325, 550, 775, 1000, 1200):
        np.testing.assert_allclose(schedule(step * 1000.0), theirs(step), rtol=1e-6, atol=1e-9)
