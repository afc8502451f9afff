"""Infinite: its published constants, its shapes in float64, and annealing from any point."""

import numpy as np
import pytest

from lm.families import SCHEDULES
from lm.mapping import UserError
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "infinite"} | options, "schedule").schedule(
        Run(TOKENS, 1000)
    )


def test_published_rates() -> None:
    """The rate falls from 3e-4 to 1.65e-4, stays constant, and falls to 3e-5."""
    schedule = create(
        peak_learning_rate=3e-4, warmup="1 percent", cooldown="60 percent", decay="25 percent"
    )
    n = np.array([0, 0.01, 0.31, 0.61, 0.7, 0.75, 0.875, 1.0]) * TOKENS
    middle = np.sqrt(1.65e-4 * 3e-5)
    expected = [0, 3e-4, (3e-4 + 1.65e-4) / 2, 1.65e-4, 1.65e-4, 1.65e-4, middle, 3e-5]
    np.testing.assert_allclose(schedule(n), expected, rtol=2e-6)


@pytest.mark.parametrize("shape", ["cosine", "inverse_sqrt"])
@pytest.mark.parametrize("alpha", [0.01, 10.0, 1000.0])
def test_infinite_agrees_with_float64(shape: str, alpha: float) -> None:
    schedule = create(
        peak_learning_rate=0.02,
        warmup="1e5 tokens",
        cooldown="5e5 tokens",
        cooldown_shape=shape,
        constant_ratio=0.4,
        alpha=alpha,
        decay="20 percent",
    )
    n = np.linspace(0, 1.1 * TOKENS, 700).astype(np.float32).astype(np.float64)
    h = lambda x: 1 / np.sqrt(1 + alpha * x) - 1
    x = np.clip((n - 1e5) / 5e5, 0, 1)
    part = (1 - np.cos(np.pi * x)) / 2 if shape == "cosine" else h(x) / h(1.0)
    stable = 0.02 + (0.008 - 0.02) * part
    fall = (3e-5 / 1.65e-4) ** np.clip((n - 8e5) / 2e5, 0, 1)
    expected = np.minimum(n / 1e5, 1) * stable * fall
    np.testing.assert_allclose(schedule(n), expected, rtol=3e-6)


def test_two_anneals_of_one_trunk_share_its_rates() -> None:
    rule = SCHEDULES.create({"family": "infinite", "decay": "50 steps"}, "schedule")
    trunk = rule.schedule(Run(1e12, 1000))
    n = np.arange(1200) * 1000.0
    for start in (700, 1000):
        branch = rule.schedule(Run(1e12, 1000, start * 1000.0))
        got, own = np.asarray(branch(n)), np.asarray(trunk(n))
        np.testing.assert_array_equal(got[: start + 1], own[: start + 1])
        np.testing.assert_allclose(got[start + 50], own[start] * (3e-5 / 1.65e-4), rtol=1e-6)


def test_an_anneal_begins_in_the_constant_phase() -> None:
    rule = SCHEDULES.create({"family": "infinite"}, "schedule")
    with pytest.raises(UserError, match=r"decay_from has seen 300000 .*ends at 600000; branch"):
        rule.schedule(Run(1e12, 1000, 300_000.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constant_ratio": 0.0}, "constant_ratio=0.0 leaves no constant phase"),
        ({"final_ratio": 0.0}, "decay_shape='geometric' never reaches final_ratio=0.0"),
        ({"alpha": 0.0}, "schedule.alpha=0.0 must lie in [0.01, 1000]"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create(**options)
    assert message in str(caught.value)


def test_phases_longer_than_the_run_are_refused() -> None:
    rule = SCHEDULES.create({"family": "infinite", "cooldown": "70 percent"}, "schedule")
    message = rule.misfit(run_tokens=TOKENS, tokens_per_step=1000, is_branch=False)
    assert "schedule.cooldown=70 percent and schedule.decay=25 percent take 1050000" in str(message)
