"""Refined: published profiles, and how gradient norms are filtered."""

import typing

import numpy as np
import pytest

from lm.families import SCHEDULES
from lm.mapping import UserError
from lm.schedules import Run, Schedule
from lm.schedules.refined import refine

TOKENS = 1_000_000


def create(**options: object) -> Schedule:
    return SCHEDULES.create({"family": "refined"} | options, "schedule").schedule(Run(TOKENS, 1000))


def refined(norms: typing.Sequence[float] | np.ndarray, **changes: typing.Any) -> np.ndarray:
    """Refines `norms` without smoothing or clipping."""
    exact = {"window": 0.0, "quantile": 0.0, "power": 2.0, "points": None}
    return refine(np.asarray(norms), **(exact | changes))


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([3, 3, 3, 3, 3], [1, 0.75, 0.5, 0.25, 0]),
        ([4, 2, 1, 1, 1], [0.1016, 0.375, 1, 0.5, 0]),
        ([4e20, 2e20, 1e20, 1e20, 1e20], [0.1016, 0.375, 1, 0.5, 0]),
    ],
)
def test_printed_profiles(norms: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(refined(norms), expected, atol=5e-5)


def test_constant_norms_give_a_linear_decay_at_any_length() -> None:
    for count in (40, 5000):
        found = refine(np.full(count, 0.3), window=0.1, quantile=0.01, power=2.0, points=11)
        np.testing.assert_allclose(found, np.linspace(1, 0, 11), atol=1e-3)


def test_spikes_and_norms_that_are_not_finite_are_left_out() -> None:
    smooth = np.linspace(2.0, 1.0, 200)
    spiky = smooth.copy()
    spiky[[0, 50, 120, 121]] = np.nan, np.inf, 1e6, 1e-9
    options = {"window": 0.1, "points": 21}
    np.testing.assert_allclose(refined(spiky, **options), refined(smooth, **options), atol=0.02)


def test_a_vanishing_norm_is_clipped_at_the_quantile() -> None:
    norms = np.ones(100)
    norms[40:43] = 1e-12
    found = refined(norms, quantile=0.05)
    np.testing.assert_allclose(found, np.append(np.arange(99, 0, -1), 0) / 99, rtol=1e-9)


def test_the_power_weighs_the_norms() -> None:
    norms = np.array([2.0, 1.0, 1.0])
    np.testing.assert_allclose(refined(norms, power=1.0), [1.0, 1.0, 0.0])
    np.testing.assert_allclose(refined(norms, power=0.0), [1.0, 0.5, 0.0])


@pytest.mark.parametrize("norms", [[], [1.0], [np.nan, 0.0, np.inf]])
def test_too_few_norms_are_refused(norms: list[float]) -> None:
    with pytest.raises(UserError, match=r"gradient norms, .*; name a run that logged"):
        refined(norms)


def test_the_profile_is_stretched_over_the_run() -> None:
    schedule = create(profile=[0.1016, 0.375, 1.0, 0.5, 0.0], peak_learning_rate=0.01)
    n = np.linspace(0, 1.1 * TOKENS, 300).astype(np.float32).astype(np.float64)
    expected = 0.01 * np.interp(n / TOKENS, np.linspace(0, 1, 5), [0.1016, 0.375, 1, 0.5, 0])
    np.testing.assert_allclose(schedule(n), expected, rtol=1e-6, atol=4e-9)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ([1.0], "profile has 1 points; set 2 or more"),
        ([0.5, 0.0], "largest value of 1.0; divide by its largest"),
        ([1.0, -0.1], "profile must lie in [0, 1]"),
    ],
)
def test_mistakes(profile: list[float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create(profile=profile)
    assert message in str(caught.value)
