"""Laws of whole loss curves, fitted to curves made from known constants."""

from __future__ import annotations

import numpy as np
import pytest

from lm.fits import curves
from lm.fits.curves import Curve
from lm.laws.annealing import Annealing
from lm.laws.multi_power import MultiPower
from lm.mapping import UserError

STEPS, WARMUP, PEAK = 20_000, 500, 2e-4
CONSTANT = PEAK * np.minimum(np.arange(STEPS) / WARMUP, 1.0)
COSINE = CONSTANT.copy()
COSINE[WARMUP:] *= 0.5 * (1 + np.cos(np.pi * np.arange(STEPS - WARMUP) / (STEPS - WARMUP)))
WSD = CONSTANT.copy()
WSD[16_000:] *= np.linspace(1, 0, 4000)
LOGGED = np.arange(1000, STEPS + 1, 500)
# The constants of the authors' code listing.
TRUE = Annealing(L0=2.628, A=0.430, alpha=0.550, C=0.411)


def logged(law: Annealing, rates: np.ndarray, noise: float, seed: int) -> Curve:
    scatter = np.exp(noise * np.random.default_rng(seed).normal(size=len(LOGGED)))
    return Curve(rates, LOGGED, law.curve(rates)[LOGGED - 1] * scatter)


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-6), (2e-4, 2e-3)])
def test_annealing_is_recovered_from_a_cosine_and_a_constant(noise: float, within: float) -> None:
    given = [logged(TRUE, COSINE, noise, 1), logged(TRUE, CONSTANT, noise, 2)]
    found = curves.annealing(given)
    assert isinstance(found.law, Annealing)
    for name in ("L0", "A", "alpha", "C"):
        assert getattr(found.law, name) == pytest.approx(getattr(TRUE, name), abs=within), name
    predicted = found.predict(WSD, [STEPS])
    truth = TRUE.curve(WSD)[-1]
    assert predicted.loss[0] == pytest.approx(truth, abs=within)
    assert predicted.low[0] - 1e-6 <= truth <= predicted.high[0] + 1e-6
    assert predicted.high[0] - predicted.low[0] < 12 * noise + 1e-5


def test_losses_in_the_warmup_do_not_count() -> None:
    """Losses before the peak rate are left out, however wrong."""
    first = Curve(COSINE, LOGGED, TRUE.curve(COSINE)[LOGGED - 1])
    early = Curve(
        COSINE, np.concatenate([[1, 100, 499], LOGGED]), np.concatenate([[11, 9, 8], first.losses])
    )
    constant = logged(TRUE, CONSTANT, 0.0, 1)
    alone = curves.annealing([first, constant], bootstraps=0)
    assert curves.annealing([early, constant], bootstraps=0).law == alone.law
    assert alone.others == ()
    band = alone.predict(WSD, [STEPS])
    assert band.low[0] == pytest.approx(band.high[0], rel=1e-6)


def test_multi_power_is_recovered_from_three_curves() -> None:
    steps, warmup, peak = 600, 40, 3e-4
    constant = peak * np.minimum(np.arange(1, steps + 1) / warmup, 1.0)
    fall = np.arange(steps - warmup) / (steps - warmup)
    cosine, linear = constant.copy(), constant.copy()
    cosine[warmup:] *= 0.1 + 0.45 * (1 + np.cos(np.pi * fall))
    linear[400:] *= np.linspace(1, 0.1, 200)
    at, law = np.arange(60, steps + 1, 20), MultiPower()
    found = curves.multi_power([Curve(r, at, law.curve(r, at)) for r in (constant, cosine, linear)])
    assert isinstance(found.law, MultiPower)
    assert np.abs(found.residuals).max() < 1e-6
    two_stage = constant.copy()
    two_stage[300:] = 1e-4
    predicted = found.predict(two_stage, [450, 600])
    np.testing.assert_allclose(predicted.loss, law.curve(two_stage, [450, 600]), atol=1e-4)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (Curve(CONSTANT, LOGGED[:3], np.ones(3)), "3 losses after the peak rate; a law of curves"),
        (Curve(-CONSTANT, LOGGED, np.ones(39)), "curve 0: its rates must be finite and >= 0"),
        (Curve(CONSTANT[:900], LOGGED, np.ones(39)), "rates of 900 steps and losses of steps 1000"),
        (Curve(CONSTANT, LOGGED, np.full(39, np.nan)), "its losses must be finite and positive"),
        (Curve(CONSTANT, LOGGED, np.zeros(39)), "its losses must be finite and positive"),
    ],
)
def test_bad_curves_are_refused(curve: Curve, message: str) -> None:
    with pytest.raises(UserError) as caught:
        curves.annealing([curve])
    assert message in str(caught.value)
