"""Constant: a warmup, then the peak."""

import numpy as np
import optax
import pytest

from lm.families import SCHEDULES
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "constant"} | options, "schedule").schedule(
        Run(TOKENS, 1000)
    )


def test_constant_equals_optax() -> None:
    schedule = create(peak_learning_rate=0.01, warmup="50 steps")
    theirs = optax.warmup_constant_schedule(0.0, 0.01, 50)
    steps = np.arange(0, 3000, 7)
    np.testing.assert_allclose(schedule(steps * 1000.0), theirs(steps), rtol=1e-6, atol=1e-12)
    assert schedule.last_before_decay(lambda tokens: tokens / 1000) is None


@pytest.mark.parametrize(
    ("options", "is_branch", "message"),
    [
        ({"warmup": "2000 steps"}, False, "schedule.warmup=2000 steps takes 2000000 tokens, run"),
        ({}, True, "decay_from with schedule.family='constant', which never decays"),
    ],
)
def test_mistakes(options: dict[str, str], is_branch: bool, message: str) -> None:
    rule = SCHEDULES.create({"family": "constant"} | options, "schedule")
    found = rule.misfit(run_tokens=TOKENS, tokens_per_step=1000, is_branch=is_branch)
    assert message in str(found)
