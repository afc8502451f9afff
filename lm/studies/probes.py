"""What AutoLRS needs to choose a learning rate (Jin et al. 2021, arXiv 2105.10762): the loss that a
short probe would reach, and the next rate to probe.

Everything is on the host, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

OUTLIERS = 0.1  # the share of points that a fit may leave out; the published code drops 3 % in each
# of 10 rounds [C]
KAPPA = 1000.0  # of the lower confidence bound; published as 1000 UNCONFIRMED, 1e6 in the code [C]
SLOWEST = 3.0  # the longest time to settle, in spans of the points
FAR = 5.0  # a residual of this many medians is an outlier
CANDIDATES = 201
# The Gaussian process on [0, 1], the interval of log rates: length scale of the kernel, and noise.
LENGTH, NOISE = 0.25, 1e-4


def forecast(times: ArrayLike, losses: ArrayLike, at: float) -> float:
    """The loss at time `at` > 0 by a e^(b t) + c through losses at earlier times; inf if a loss is
    not finite.

    For every b the best a and c are a linear problem, so only b is searched. -1 / b, the time that
    the curve takes to settle, is at most three times the span of the points: a slower curve cannot
    be distinguished from a straight line, which has no limit. Points far from the curve are left
    out.

    >>> t = np.arange(1, 11)
    >>> round(forecast(t, 2 * np.exp(-t / 5) + 3, 100), 6)
    3.0
    """
    t, y = np.asarray(times, np.float64), np.asarray(losses, np.float64)
    if not np.isfinite(y).all():
        return float("inf")
    fastest = max(min(np.diff(np.unique(t)), default=at) / 4, at * 1e-4)
    slowest = max(fastest, min(at, SLOWEST * float(np.ptp(t))))
    settling = np.geomspace(fastest, slowest, 200)
    kept = np.ones(len(t), bool)
    value, residuals = _fitted(t, y, kept, settling, at)
    for _ in range(int(OUTLIERS * len(t))):
        size = np.abs(residuals)
        worst = int(np.argmax(np.where(kept, size, -1.0)))
        if size[worst] <= FAR * np.median(size[kept]):
            break
        kept[worst] = False
        value, residuals = _fitted(t, y, kept, settling, at)
    return value


def _fitted(
    t: np.ndarray, y: np.ndarray, kept: np.ndarray, settling: np.ndarray, at: float
) -> tuple[float, np.ndarray]:
    """The value at `at` of the best curve through the kept points, and all residuals."""
    curves = np.exp(-t[None] / settling[:, None])  # [settling, points]
    x, z = curves[:, kept], y[kept]
    centered = x - x.mean(axis=1, keepdims=True)
    spread = np.sum(centered**2, axis=1)
    a = np.where(spread > 0, centered @ (z - z.mean()) / np.maximum(spread, 1e-300), 0.0)
    c = z.mean() - a * x.mean(axis=1)
    residuals = y[None] - (a[:, None] * curves + c[:, None])
    best = int(np.argmin(np.sum(residuals[:, kept] ** 2, axis=1)))
    value = a[best] * np.exp(-at / settling[best]) + c[best]
    return float(value), residuals[best]


def propose(
    rates: Sequence[float], losses: Sequence[float], low: float, high: float, kappa: float = KAPPA
) -> float:
    """The next rate in [low, high]: where a Gaussian process on the log of the rate, given the
    losses so far, has the lowest lower confidence bound, mean - kappa * deviation. The first is the
    middle. A loss that is not finite counts as the worst finite one plus their spread.
    """
    place = lambda rate: (np.log(rate) - np.log(low)) / (np.log(high) - np.log(low))
    if not rates:
        return float(np.sqrt(low * high))
    y = np.asarray(losses, np.float64)
    finite = y[np.isfinite(y)]
    worst = 2 * finite.max() - finite.min() if len(finite) else 1.0
    y = np.where(np.isfinite(y), y, worst)
    y = (y - y.mean()) / (y.std() or 1.0)
    mean, deviation, grid = _posterior(np.asarray([place(rate) for rate in rates]), y)
    best = grid[int(np.argmin(mean - kappa * deviation))]
    return float(low * (high / low) ** best)


def _posterior(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and deviation at CANDIDATES points of [0, 1] given `y` at `x`; unit prior variance."""
    grid = np.linspace(0.0, 1.0, CANDIDATES)
    kernel = lambda a, b: np.exp(-0.5 * ((a[:, None] - b[None]) / LENGTH) ** 2)
    known = np.linalg.cholesky(kernel(x, x) + NOISE * np.eye(len(x)))
    cross = np.linalg.solve(known, kernel(x, grid))
    mean = cross.T @ np.linalg.solve(known, y)
    deviation = np.sqrt(np.maximum(1.0 - np.sum(cross**2, axis=0), 0.0))
    return mean, deviation, grid
