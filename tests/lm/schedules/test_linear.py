"""Linear falls to zero and equals optax's."""

import numpy as np
import optax

from lm.families import SCHEDULES
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "linear"} | options, "schedule").schedule(Run(TOKENS, 1000))


def test_linear_equals_optax_after_a_warmup() -> None:
    schedule = create(peak_learning_rate=0.01, warmup="100 steps", final_ratio=0.1)
    theirs = optax.join_schedules(
        [optax.linear_schedule(0.0, 0.01, 100), optax.linear_schedule(0.01, 0.001, 900)], [100]
    )
    for step in (0, 50, 100, 325, 550, 775, 1000, 1200):
        np.testing.assert_allclose(schedule(step * 1000.0), theirs(step), rtol=1e-6, atol=1e-9)


def test_linear_ends_at_zero() -> None:
    rates = create(warmup="0 steps", peak_learning_rate=1.0)(np.arange(5) * 0.25 * TOKENS)
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-6)
