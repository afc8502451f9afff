"""The forecast of a loss and the choice of the next rate, on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lm.studies import probes


def curve(t: np.ndarray, a: float, settling: float, c: float) -> np.ndarray:
    return a * np.exp(-t / settling) + c


@pytest.mark.parametrize("settling", [3.0, 20.0, 60.0, 116.0])
def test_a_forecast_of_an_exponential_is_exact(settling: float) -> None:
    t = np.arange(40)
    found = probes.forecast(t, curve(t, 2.0, settling, 3.0), 400)
    assert found == pytest.approx(curve(np.asarray(400.0), 2.0, settling, 3.0), rel=1e-2)


def test_noise_and_outliers() -> None:
    """3 % of the points are outliers. In each of 50 draws the forecast is within 1 % of
    the truth.
    """
    rng, t = np.random.default_rng(0), np.arange(100)
    found = []
    for _ in range(50):
        y = curve(t, 2.0, 20.0, 3.0) + 0.02 * rng.standard_normal(100)
        y[rng.choice(100, 3, replace=False)] += rng.choice([-3.0, 3.0], 3)
        found.append(probes.forecast(t, y, 1000))
    assert np.abs(np.asarray(found) - 3.0).max() < 0.03


def test_few_points_do_not_extrapolate_far() -> None:
    """From points on a falling line, the forecast is about that of an exponential whose time
    constant is three times their span.
    """
    t = np.arange(10)
    found = probes.forecast(t, -0.1 * t, 1000)
    settled = -0.9 / (1 - np.exp(-1 / 3))
    assert 1.2 * settled < found < 0.9 * settled


def test_what_is_not_finite() -> None:
    assert probes.forecast([0, 1, 2], [1.0, np.nan, 1.0], 10) == np.inf
    assert probes.forecast([0, 1, 2], [1.0, 1.0, 1.0], 10) == pytest.approx(1.0)


@pytest.mark.parametrize("best", [2e-4, 3e-3, 0.07])
@pytest.mark.parametrize("kappa", [1.0, probes.KAPPA])
def test_ten_probes_find_the_minimum_of_a_quadratic(best: float, kappa: float) -> None:
    """The loss is quadratic in the log of the rate, over three orders of magnitude. The best of ten
    probes is within a factor of 1.5 of the minimum.
    """
    rates: list[float] = []
    losses: list[float] = []
    for _ in range(10):
        rates.append(probes.propose(rates, losses, 1e-4, 0.1, kappa))
        losses.append(np.log(rates[-1] / best) ** 2)
    found = rates[int(np.argmin(losses))]
    assert abs(np.log(found / best)) < np.log(1.5)
    assert all(1e-4 * (1 - 1e-9) <= rate <= 0.1 * (1 + 1e-9) for rate in rates)
    assert rates[0] == pytest.approx(np.sqrt(1e-5))


def test_probes_that_diverged_are_worse_than_all_others() -> None:
    above = probes.propose([0.001, 0.01, 0.1], [1.0, 0.5, np.inf], 1e-4, 1.0, 0.1)
    assert above < 0.05
    assert 1e-4 <= probes.propose([0.01], [np.inf], 1e-4, 1.0) <= 1.0
