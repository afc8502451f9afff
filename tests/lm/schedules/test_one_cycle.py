"""One cycle equals optax's."""

import numpy as np
import optax

from lm.families import SCHEDULES
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "one_cycle"} | options, "schedule").schedule(
        Run(TOKENS, 1000)
    )


def test_one_cycle_equals_optax() -> None:
    schedule = create(peak_learning_rate=0.01)
    theirs = optax.cosine_onecycle_schedule(1000, 0.01)
    for step in (0, 100, 299, 300, 301, 500, 900, 999, 1000, 1100):
        np.testing.assert_allclose(schedule(step * 1000.0), theirs(step), rtol=1e-6, atol=1e-9)


def test_a_rise_as_long_as_the_run_is_refused() -> None:
    rule = SCHEDULES.create({"family": "one_cycle", "rise": "100 percent"}, "schedule")
    message = rule.misfit(run_tokens=TOKENS, tokens_per_step=1000, is_branch=False)
    assert "schedule.rise=100 percent takes 1000000 tokens, run.length has 1000000" in str(message)
