"""Steps equal optax's; the defaults are DeepSeek's."""

import numpy as np
import optax
import pytest

from lm.families import SCHEDULES
from lm.mapping import UserError
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "step"} | options, "schedule").schedule(Run(TOKENS, 1000))


def test_step_equals_optax_piecewise_constant() -> None:
    schedule = create(peak_learning_rate=0.01, warmup="0 steps")
    theirs = optax.piecewise_constant_schedule(0.01, {800: 0.316, 900: 0.1 / 0.316})
    for step in (0, 1, 799, 800, 801, 899, 900, 1000):
        np.testing.assert_allclose(schedule(step * 1000.0), theirs(step), rtol=1e-6)


def test_warmup_and_factors_are_of_the_peak() -> None:
    schedule = create(peak_learning_rate=1.0, warmup="100 steps")
    n = np.array([0, 50, 100, 799.9, 800, 899.9, 900, 1500]) * 1000.0
    np.testing.assert_allclose(schedule(n), [0, 0.5, 1, 1, 0.316, 0.316, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("tokens_per_step", [1000, 3000])
def test_weights_have_decayed_with_the_first_lower_rate(tokens_per_step: int) -> None:
    rule = SCHEDULES.create({"family": "step"}, "schedule")
    schedule = rule.schedule(Run(TOKENS, tokens_per_step))
    for step in range(250, 900):
        lower = float(schedule((step - 1.0) * tokens_per_step)) < np.float32(0.02)
        assert schedule.is_decayed(step * tokens_per_step, tokens_per_step) == lower, step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": [0.5]}, "at has 2 points and factors 1; set as many"),
        ({"at": [], "factors": []}, "at has 0 points and factors 0"),
        ({"factors": [0.5, 1.5]}, "must lie in [0, 1], each in the peak"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("at", [["80 percent", "10 steps"], ["10 steps", "80 percent"]])
def test_points_that_do_not_rise_are_refused(at: list[str]) -> None:
    rule = SCHEDULES.create({"family": "step", "at": at, "warmup": "20 steps"}, "schedule")
    message = rule.misfit(run_tokens=TOKENS, tokens_per_step=1000, is_branch=False)
    assert "schedule.at: 10 steps does not come after" in str(message)
