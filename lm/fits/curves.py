"""Fits of the laws of whole loss curves: annealing and multi-power.

    curve = Curve(rates, steps, losses)      the rate of every step, and losses at some steps
    found = annealing([curve, ...])          the law and its uncertainty
    found.predict(rates)                     the loss of every step of another schedule, with a band

A curve is used from its first peak rate on, because the laws do not hold before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from lm.fits import solve
from lm.laws import LOSS_DELTA
from lm.laws import annealing as annealing_law
from lm.laws.annealing import Annealing
from lm.laws.multi_power import MultiPower
from lm.mapping import UserError

BLOCKS = 10  # per curve, resampled as blocks: losses of neighboring steps are not independent
FEWEST = 20  # losses of all curves together
MULTI_POWER_POINTS = 80  # per curve in a fit of the multi-power law: each point costs a sum
_MULTI_POWER_NAMES = ("L0", "A", "alpha", "B", "C", "beta", "gamma")


class Curve(NamedTuple):
    """`rates` [all steps of the run], `steps` [n] from 1 on, `losses` [n] after those steps."""

    rates: np.ndarray
    steps: np.ndarray
    losses: np.ndarray


class Predicted(NamedTuple):
    """Losses after each requested step, and the band that holds 95 % of what a run would log."""

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class CurveFit:
    """A fitted law. `others` are fits of the same law to resampled blocks of the curves.
    `residuals` are log(measured / predicted loss) for every point.
    """

    law: Annealing | MultiPower
    others: tuple[Annealing | MultiPower, ...]
    residuals: np.ndarray

    def predict(self, rates: np.ndarray, steps: Sequence[int] | None = None) -> Predicted:
        """The losses under a schedule, given by the rate of every step. `steps` are the requested
        steps, from 1 (None: all).

        The band comes from resampled fits and residuals. It does not include errors of the law
        itself.
        """
        asked = np.arange(1, len(rates) + 1) if steps is None else np.asarray(steps)
        center = _curve(self.law, rates, asked)
        made = np.stack([_curve(law, rates, asked) for law in self.others or (self.law,)])
        # Every fit with every residual: the middle 95 % of their products.
        spread = np.quantile(self.residuals, np.linspace(0.005, 0.995, 100))
        with np.errstate(invalid="ignore"):
            all_of_them = (made[:, None] * np.exp(spread)[:, None]).reshape(-1, len(asked))
            low, high = np.quantile(all_of_them, (0.025, 0.975), axis=0)
        return Predicted(center, low, high)


def _curve(law: Annealing | MultiPower, rates: np.ndarray, steps: np.ndarray) -> np.ndarray:
    if isinstance(law, MultiPower):
        return law.curve(rates, steps)
    return law.curve(rates)[steps - 1]


def annealing(
    curves: Sequence[Curve], *, decay: float = 0.999, bootstraps: int = 200, seed: int = 0
) -> CurveFit:
    """The annealing law of one or more curves. `decay` is the law's lambda, which is not fitted.

    Raises:
      UserError: a curve without enough losses after its peak, or with one that is not positive.
    """
    kept = [_after_peak(curve, i) for i, curve in enumerate(curves)]
    _check_enough(kept)
    parts = [_sums_at(curve, decay) for curve in kept]
    s1, s2 = (np.concatenate(column) for column in zip(*parts, strict=True))
    equation = Annealing.equations[0]
    logs = np.log(np.concatenate([curve.losses for curve in kept]))
    data = solve.Data({"summed_rate": s1, "annealed_rate": s2}, logs)
    best = solve.full(equation, data, np.ones(len(logs)))
    made = lambda theta: Annealing(
        decay=decay, **dict(zip(equation.names, map(float, equation.to_values(theta)), strict=True))
    )
    rng = np.random.default_rng(seed)
    others: tuple[Annealing, ...] = ()
    if bootstraps:
        weights = np.concatenate(
            [_block_weights(len(curve.steps), bootstraps, rng) for curve in kept], axis=1
        )
        found = solve.resampled(equation, data, weights, best.theta)
        others = tuple(made(theta) for theta in found.theta if np.isfinite(theta).all())
    predicted, _ = equation.evaluate(best.theta[:1], data.columns)
    return CurveFit(made(best.theta[0]), others, logs - predicted[0])


def multi_power(curves: Sequence[Curve]) -> CurveFit:
    """The multi-power law of several curves. It has seven constants, so give three curves or more.
    Nothing is resampled: the band comes from the residuals alone.

    Raises:
      UserError: as `annealing`.
    """
    kept = [_thinned(_after_peak(curve, i)) for i, curve in enumerate(curves)]
    _check_enough(kept)
    logs = np.log(np.concatenate([curve.losses for curve in kept]))

    def residuals(theta: np.ndarray) -> np.ndarray:
        law = MultiPower(**dict(zip(_MULTI_POWER_NAMES, np.exp(theta), strict=True)))
        made = np.concatenate([law.curve(curve.rates, curve.steps) for curve in kept])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num(np.log(made) - logs, nan=1e3, posinf=1e3, neginf=-1e3)

    simple = annealing(curves, bootstraps=0).law
    assert isinstance(simple, Annealing)
    tries = []
    for factor, beta, gamma in ((100.0, 0.6, 0.6), (300.0, 0.6, 0.6), (300.0, 0.3, 0.4)):
        first = (simple.L0, simple.A, simple.alpha, factor, 2.0, beta, gamma)
        theta = np.log(np.maximum(first, 1e-6))
        tries.append(least_squares(residuals, theta, loss="huber", f_scale=LOSS_DELTA, x_scale=0.3))
    found = min(tries, key=lambda tried: tried.cost)
    constants = dict(zip(_MULTI_POWER_NAMES, map(float, np.exp(found.x)), strict=True))
    return CurveFit(MultiPower(**constants), (), -residuals(found.x))


def _after_peak(curve: Curve, place: int) -> Curve:
    """The losses after the first step with the largest rate."""
    rates = np.asarray(curve.rates, dtype=np.float64)
    steps = np.asarray(curve.steps, dtype=np.int64)
    losses = np.asarray(curve.losses, dtype=np.float64)
    if not (np.isfinite(rates).all() and rates.min(initial=0.0) >= 0 and rates.max(initial=0) > 0):
        raise UserError(f"curve {place}: its rates must be finite and >= 0, and one above 0")
    if len(steps) and not 1 <= steps.min() <= steps.max() <= len(rates):
        raise UserError(
            f"curve {place}: it has rates of {len(rates)} steps and losses of steps {steps.min()} "
            f"to {steps.max()}; give the rate of every step"
        )
    is_kept = steps > int(np.argmax(rates))
    losses, steps = losses[is_kept], steps[is_kept]
    if not (np.isfinite(losses).all() and losses.min(initial=1.0) > 0):
        raise UserError(f"curve {place}: its losses must be finite and positive; leave others out")
    return Curve(rates, steps, losses)


def _check_enough(curves: Sequence[Curve]) -> None:
    if (count := sum(len(curve.steps) for curve in curves)) < FEWEST:
        raise UserError(
            f"{count} losses after the peak rate; a law of curves needs {FEWEST} or more: log more "
            "often, or give longer runs"
        )


def _sums_at(curve: Curve, decay: float) -> tuple[np.ndarray, np.ndarray]:
    s1, s2 = annealing_law.sums(curve.rates, decay)
    return s1[curve.steps - 1], s2[curve.steps - 1]


def _thinned(curve: Curve) -> Curve:
    places = np.unique(np.linspace(0, len(curve.steps) - 1, MULTI_POWER_POINTS).round().astype(int))
    return Curve(curve.rates, curve.steps[places], curve.losses[places])


def _block_weights(count: int, bootstraps: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `count` points is drawn [bootstraps, count], in blocks of neighbors."""
    blocks = np.arange(count) * min(BLOCKS, count) // count
    num_blocks = int(blocks[-1]) + 1
    drawn = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=bootstraps)
    return drawn[:, blocks].astype(np.float64)
