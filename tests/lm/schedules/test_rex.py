"""REX against its formula and the values of two implementations."""

import numpy as np
import pytest

from lm.families import SCHEDULES
from lm.mapping import UserError
from lm.schedules import Run, Schedule

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "rex"} | options, "schedule").schedule(Run(TOKENS, 1000))


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        (0.5, (0.8571, 0.6667, 0.4)),
        (0.9, (0.9677, 0.9091, 0.7692)),
        (0.0, (0.75, 0.5, 0.25)),
    ],
)
def test_printed_values(d: float, expected: tuple[float, ...]) -> None:
    schedule = create(d=d, warmup="0 steps", peak_learning_rate=1.0)
    got = schedule(np.array([0.25, 0.5, 0.75]) * TOKENS)
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_rex_agrees_with_float64() -> None:
    schedule = create(d=0.9, warmup="1e5 tokens", final_ratio=0.1, peak_learning_rate=0.02)
    n = np.linspace(0, 1.1 * TOKENS, 500).astype(np.float32).astype(np.float64)
    x = np.clip((n - 1e5) / 9e5, 0, 1)
    fall = 0.1 + 0.9 * (1 - x) / (0.1 + 0.9 * (1 - x))
    expected = 0.02 * np.minimum(n / 1e5, 1) * fall
    np.testing.assert_allclose(schedule(n), expected, rtol=1e-6, atol=2e-8)


def test_d_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.d=1\.0 must lie in \[0, 1\)"):
        create(d=1.0)
