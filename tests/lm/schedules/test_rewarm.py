"""Re-warming and re-decaying equal two schedules of optax."""

import numpy as np
import optax

from lm.families import SCHEDULES
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "rewarm"} | options, "schedule").schedule(Run(TOKENS, 1000))


def test_rewarm_equals_optax_warmup_cosine() -> None:
    schedule = create(peak_learning_rate=3e-4, warmup="10 steps")
    theirs = optax.warmup_cosine_decay_schedule(3e-5, 3e-4, 10, 1000, 3e-5)
    for step in (0, 5, 10, 250, 505, 750, 1000, 1100):
        np.testing.assert_allclose(schedule(step * 1000.0), theirs(step), rtol=1e-6)


def test_rewarm_without_a_warmup_begins_at_the_peak() -> None:
    schedule = create(peak_learning_rate=1.0, warmup="0 steps", decay_shape="linear")
    rates = schedule(np.array([0.0, 0.5, 1.0]) * TOKENS)
    np.testing.assert_allclose(rates, [1.0, 0.55, 0.1], rtol=1e-6)


def test_the_first_rate_is_the_last_of_the_previous_run() -> None:
    before, after = create(start_ratio=0.25), create(start_ratio=0.1)
    assert float(before(0.0)) == np.float32(0.005)
    np.testing.assert_allclose(float(after(0.0)), float(before(1.0 * TOKENS)), rtol=1e-6)
