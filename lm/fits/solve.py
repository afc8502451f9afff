"""Huber regression of log residuals, many weighted problems of one equation at once.

The objective is sum_r w_r huber(log y_r - f_r(theta)). A step solves (N + mu M) step = gradient. N
is J^T W J over the residuals within delta, the Huber loss's own curvature. M is J^T W J where a
residual beyond delta is weighted by delta / |r|: this quadratic touches the loss at theta and
bounds it from above (Holland and Welsch 1977). So a large mu always goes downhill, and a small mu
is Newton's method. Bootstraps differ only in their weights, and are solved as one array.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm.laws import Columns, Equation

ITERATIONS = 300  # at most; a start that still descends then is used as it is
TOLERANCE = 1e-9  # a problem is done when a step lowers its loss by less, relatively
CHUNK = 1 << 19  # numbers in one derivative array: what a core's cache holds
POLISHED = 32  # number of starts, the best of all combinations, from which a descent is made
RIDGE = 1e-9  # relative to the diagonal; keeps undetermined directions from moving
NUM_BEST = 3  # solutions of a fit from which its bootstraps start
SINGULAR = 1e-12  # smallest over largest eigenvalue: the data do not determine some direction


class Data(NamedTuple):
    """The columns that an equation reads [R], and the logarithm of its target [R]."""

    columns: Columns
    logs: np.ndarray


class Solved(NamedTuple):
    """theta [S, P] and the Huber loss [S] of every problem."""

    theta: np.ndarray
    cost: np.ndarray


def starts(equation: Equation) -> np.ndarray:
    """Every combination of an equation's start values, theta [S, P]."""
    grids = zip(equation.starts, equation.is_log, strict=True)
    axes = [[np.log(v) if is_log else v for v in values] for values, is_log in grids]
    return np.array(list(itertools.product(*axes)), dtype=np.float64)


def full(equation: Equation, data: Data, weights: np.ndarray) -> Solved:
    """The best distinct solutions [at most NUM_BEST, P] over all starts, best first. Solutions
    that the rows do not determine are left out, unless there are no others.
    """
    tried = starts(equation)
    costs = cost(equation, data, weights, tried)
    order = np.argsort(costs, kind="stable")[:POLISHED]
    tried = tried[order][np.isfinite(costs[order])]
    rows = np.broadcast_to(weights, (len(tried), len(weights)))
    found = descend(equation, data, rows, tried)
    if not (is_open := is_singular(equation, data, rows, found.theta)).all():
        found = Solved(found.theta[~is_open], found.cost[~is_open])
    kept: list[int] = []
    for i in np.argsort(found.cost, kind="stable"):
        is_new = all(
            not np.allclose(found.theta[i], found.theta[j], rtol=1e-4, atol=1e-4) for j in kept
        )
        if is_new and len(kept) < NUM_BEST:
            kept.append(int(i))
    return Solved(found.theta[kept], found.cost[kept])


def resampled(
    equation: Equation,
    data: Data,
    weights: np.ndarray,
    best: np.ndarray,
    progress: Callable[[int], None] = lambda _: None,
) -> Solved:
    """The solution for each row of weights [S, R]: the best of the descents from each of `best`
    [J, P]. theta is NaN where the rows with weight do not determine it. `progress(n)` is called
    after n more.
    """
    chunk = max(1, CHUNK // (len(data.logs) * best.shape[1]))
    thetas, costs = [], []
    for begin in range(0, len(weights), chunk):
        part = weights[begin : begin + chunk]
        tries = [descend(equation, data, part, np.tile(start, (len(part), 1))) for start in best]
        winner = np.argmin([tried.cost for tried in tries], axis=0)
        places = np.arange(len(part))
        theta = np.stack([tried.theta for tried in tries])[winner, places]
        theta[is_singular(equation, data, part, theta)] = np.nan
        thetas.append(theta)
        costs.append(np.stack([tried.cost for tried in tries])[winner, places])
        progress(len(part))
    return Solved(np.concatenate(thetas), np.concatenate(costs))


def cost(equation: Equation, data: Data, weights: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The Huber loss [S] at theta [S, P] with weights [R] or [S, R]; infinite where it does not
    exist, for example for a prediction that is not positive.
    """
    chunk = max(1, CHUNK // (len(data.logs) * theta.shape[1]))
    rows = np.broadcast_to(weights, (len(theta), len(data.logs)))
    found = [
        _state(equation, data, rows[i : i + chunk], theta[i : i + chunk])[0]
        for i in range(0, len(theta), chunk)
    ]
    return np.concatenate(found)


def descend(equation: Equation, data: Data, weights: np.ndarray, theta: np.ndarray) -> Solved:
    """Descends from theta [S, P] with weights [S, R] until each problem is done."""
    theta = theta.copy()
    costs, residuals, slopes = _state(equation, data, weights, theta)
    final = costs.copy()
    damping = np.full(len(theta), 1.0)
    active = np.arange(len(theta))
    for _ in range(ITERATIONS):
        if not len(active):
            break
        step = _step(slopes, weights[active], residuals, equation.delta, damping)
        trial = theta[active] + step
        new_costs, new_residuals, new_slopes = _state(equation, data, weights[active], trial)
        is_better = new_costs < costs
        fell = np.where(is_better, costs - new_costs, np.inf)
        theta[active[is_better]] = trial[is_better]
        final[active[is_better]] = new_costs[is_better]
        damping = np.where(is_better, np.maximum(damping * 0.2, 1e-8), damping * 5.0)
        is_left = (fell > TOLERANCE * np.abs(costs)) & (damping < 1e9)
        costs = np.where(is_better, new_costs, costs)[is_left]
        residuals = np.where(is_better[:, None], new_residuals, residuals)[is_left]
        slopes = np.where(is_better[:, None, None], new_slopes, slopes)[is_left]
        damping, active = damping[is_left], active[is_left]
    return Solved(theta, final)


def gram(equation: Equation, data: Data, weights: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """J^T W J [S, P, P] at theta [S, P]. The column of each exponent is made orthogonal to that of
    its factor, so that the result does not depend on units. Columns are scaled to length 1.
    """
    with np.errstate(all="ignore"):  # theta may have diverged
        slopes = equation.evaluate(theta, data.columns)[1] * np.sqrt(weights)[:, None]
    slopes = np.nan_to_num(slopes, posinf=0.0, neginf=0.0)
    before = np.sqrt(np.sum(slopes**2, axis=2, keepdims=True))
    for exponent, factor in equation.pairs:
        other = slopes[:, factor]
        along = np.sum(slopes[:, exponent] * other, axis=1) / np.maximum(
            np.sum(other**2, axis=1), 1e-300
        )
        slopes[:, exponent] -= along[:, None] * other
    size = np.sqrt(np.sum(slopes**2, axis=2, keepdims=True))
    # If a factor explains a direction fully, what remains of it is rounding.
    slopes *= np.where(size > 1e-9 * before, 1.0 / np.maximum(size, 1e-300), 0.0)
    return slopes @ np.swapaxes(slopes, 1, 2)


def is_singular(
    equation: Equation, data: Data, weights: np.ndarray, theta: np.ndarray
) -> np.ndarray:
    """For each problem [S], whether its rows leave a direction of theta undetermined."""
    found = np.linalg.eigvalsh(gram(equation, data, weights, theta))
    # A column of length zero leaves a 0 on the diagonal, which is an eigenvalue.
    return found[:, 0] <= SINGULAR * found[:, -1]


def _state(
    equation: Equation, data: Data, weights: np.ndarray, theta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Huber loss [S], residuals [S, R] and derivatives of the prediction [S, R, P] at theta."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        predicted, slopes = equation.evaluate(theta, data.columns)
        residuals = data.logs - predicted
        size, delta = np.abs(residuals), equation.delta
        huber = np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))
        costs = np.sum(weights * huber, axis=1)
    return np.where(np.isfinite(costs), costs, np.inf), residuals, slopes


def _step(
    slopes: np.ndarray,
    weights: np.ndarray,
    residuals: np.ndarray,
    delta: float,
    damping: np.ndarray,
) -> np.ndarray:
    """(N + damping M)^-1 gradient [S, P]."""
    size = np.abs(residuals)
    bounding = weights * np.minimum(1.0, delta / np.maximum(size, 1e-300))
    gradient = (slopes @ (bounding * residuals)[..., None])[..., 0]
    combined = np.where(size <= delta, weights, 0.0) + damping[:, None] * bounding
    hessian = (slopes * combined[:, None]) @ np.swapaxes(slopes, 1, 2)
    diagonal = np.einsum("spp->sp", hessian)
    places = np.arange(hessian.shape[1])
    hessian[:, places, places] += RIDGE * diagonal + 1e-300
    return np.linalg.solve(hessian, gradient[..., None])[..., 0]
