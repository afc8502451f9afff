"""A law fitted to rows: constants, their intervals, and what the rows cannot determine.

Order of steps: one fit from many starts (solve.full) -> residuals and the condition of the problem
-> 1,000 resamples of whole clusters of rows that share trunks, each from the three best solutions
-> fits that leave out one scale each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

from lm.fits import select, solve
from lm.fits.select import Selected
from lm.laws import Columns, Equation
from lm.mapping import UserError

BOOTSTRAPS = 1000
FEWEST_CLUSTERS = 5  # for an interval
LEVEL = 0.95
SCALES = ("width", "body_parameters", "parameters")
CONDITION = 1e3  # of normalized directions; above it two constants trade off against each other


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A scale that a fit did not see: the root mean squares of its rows' log residuals, under the
    fit of all rows and under the fit without it (NaN: the other rows do not determine the
    constants).
    """

    scale: str
    rows: int
    within: float
    without: float


@dataclasses.dataclass(frozen=True)
class Test:
    """A test of a constant against a value: the Wald statistic with cluster-robust errors, its two-
    sided p by Student's t with clusters - 1 degrees of freedom, and whether the bootstrap interval
    holds the value.
    """

    name: str
    value: float
    statistic: float
    p: float
    is_inside: bool


@dataclasses.dataclass(frozen=True)
class Fitted:
    """`theta` [P] and `samples` [B, P] are in the equation's parameters; `values` and `intervals`
    are the law's constants (no intervals without bootstraps). `residuals` [rows] are
    log(measured / predicted). `condition` is that of the normalized directions; `weakest` are the
    constants of the worst direction.
    """

    equation: Equation
    selected: Selected
    clusters: np.ndarray
    theta: np.ndarray
    samples: np.ndarray
    residuals: np.ndarray
    condition: float
    weakest: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    tests: tuple[Test, ...]
    warnings: tuple[str, ...]

    @property
    def values(self) -> dict[str, float]:
        found = self.equation.to_values(self.theta).tolist()
        return dict(zip(self.equation.names, found, strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        if not len(self.samples):
            return {}
        ends = self.equation.to_values(interval(self.samples, self._num_clusters))
        names = self.equation.names
        return {name: (float(ends[0, p]), float(ends[1, p])) for p, name in enumerate(names)}

    @property
    def _num_clusters(self) -> int:
        return int(self.clusters.max()) + 1

    def predict(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """The target at other columns [rows], and from every bootstrap [B, rows]."""
        center, _ = self.equation.evaluate(self.theta[None], columns)
        made, _ = self.equation.evaluate(self.samples, columns)
        return np.exp(center[0]), np.exp(made)


def fit(
    equation: Equation,
    selected: Selected,
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    hypotheses: tuple[tuple[str, float], ...] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Fits one equation of a law. `hypotheses` maps constants to values to test them against.
    `progress(n)` is called after n more bootstraps.

    Raises:
      UserError: too few rows, a column of one value, or too few clusters for an interval.
    """
    _check(equation, selected, bootstraps)
    logs = np.log(selected.columns[equation.target])
    data = solve.Data({name: selected.columns[name] for name in equation.reads}, logs)
    ones = np.ones(len(selected))
    best = solve.full(equation, data, ones)
    theta = best.theta[0]
    condition, weakest = _condition(equation, data, theta)
    clusters = select.clusters(selected.trunks)
    if solve.is_singular(equation, data, ones[None], theta[None])[0]:
        raise UserError(
            f"the rows do not tell {' and '.join(weakest)} apart: the columns they act on "
            "change together, or not at all; vary them separately, or hold one by --hold=NAME=VALUE"
        )
    warnings = []
    if condition > CONDITION:
        warnings.append(
            f"{' and '.join(weakest)} trade against each other (condition number {condition:.2g}): "
            "the rows do not tell them apart"
        )
    samples = np.empty((0, len(theta)))
    if bootstraps:
        drawn = cluster_weights(clusters, bootstraps, np.random.default_rng(seed))
        samples = _determined(solve.resampled(equation, data, drawn, best.theta, progress).theta)
    if bootstraps and len(samples) < 0.9 * bootstraps:
        warnings.append(
            f"{bootstraps - len(samples)} of {bootstraps} resamples do not determine the constants "
            "and are left out: the intervals are too narrow"
        )
    predicted, _ = equation.evaluate(theta[None], data.columns)
    made = Fitted(
        equation=equation,
        selected=selected,
        clusters=clusters,
        theta=theta,
        samples=samples,
        residuals=logs - predicted[0],
        condition=condition,
        weakest=weakest,
        left_out=_each_scale(equation, data, selected, best.theta),
        tests=(),
        warnings=tuple(warnings),
    )
    tests = tuple(_test(made, data, name, value) for name, value in hypotheses if len(samples))
    return dataclasses.replace(made, tests=tests)


def held(equation: Equation, values: Mapping[str, float]) -> Equation:
    """The equation with some constants fixed; its names then no longer include these.

    Raises:
      UserError: a name that the equation does not have, or a value that the constant cannot have.
    """
    for name, value in values.items():
        if name not in equation.names:
            known = ", ".join(equation.names)
            raise UserError(f"--hold={name}={value:g}: the constants of this law are {known}")
        if equation.is_log[equation.names.index(name)] and not value > 0:
            raise UserError(f"--hold={name}={value:g} must be positive")
    if len(values) == len(equation.names):
        raise UserError(f"--hold fixes all of {', '.join(equation.names)}; leave one to fit")
    free = [p for p, name in enumerate(equation.names) if name not in values]
    fixed = np.zeros(len(equation.names))
    for p, name in enumerate(equation.names):
        if name in values:
            fixed[p] = np.log(values[name]) if equation.is_log[p] else values[name]

    def evaluate(theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        whole = np.tile(fixed, (len(theta), 1))
        whole[:, free] = theta
        logs, slopes = equation.evaluate(whole, columns)
        return logs, slopes[:, free]

    keep = lambda values: tuple(values[p] for p in free)
    places = {p: i for i, p in enumerate(free)}
    pairs = [(places[e], places[f]) for e, f in equation.pairs if e in places and f in places]
    return dataclasses.replace(
        equation,
        names=keep(equation.names),
        is_log=keep(equation.is_log),
        starts=keep(equation.starts),
        evaluate=evaluate,
        pairs=tuple(pairs),
    )


def cluster_weights(clusters: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """How often each row is drawn [count, rows], if clusters are drawn with replacement."""
    total = int(clusters.max()) + 1
    drawn = rng.multinomial(total, np.full(total, 1.0 / total), size=count)
    return drawn[:, clusters].astype(np.float64)


def interval(samples: np.ndarray, num_clusters: int) -> np.ndarray:
    """The two ends [2, ...] of the middle LEVEL of samples [B, ...]. The percentiles are moved
    outward for the number n of clusters: a plain bootstrap is too narrow by about sqrt((n - 1) / n)
    and by the tails of Student's t (Hesterberg 2015, "expanded percentile").
    """
    quantile = stats.t.ppf(0.5 + LEVEL / 2, num_clusters - 1)
    tail = stats.norm.cdf(-quantile * np.sqrt(num_clusters / (num_clusters - 1)))
    return np.quantile(samples, (tail, 1 - tail), axis=0)


def _determined(samples: np.ndarray) -> np.ndarray:
    """The resamples that determine every constant.

    Raises:
      UserError: none does.
    """
    found = samples[np.isfinite(samples).all(axis=1)]
    if not len(found):
        raise UserError("no resample determines the constants; sweep more cells")
    return found


def _check(equation: Equation, selected: Selected, bootstraps: int) -> None:
    columns, wanted = selected.columns, len(equation.names)
    # In an equation with held constants, the column of a held constant may have a single value.
    for name in equation.reads:
        if len(np.unique(columns[name])) == 1 and _is_flat(equation, columns, name):
            raise UserError(
                f"all {len(selected)} rows have {name}={columns[name][0]:g}, so nothing can be "
                f"fitted over it; sweep {name}, or hold its constant by --hold=NAME=VALUE"
            )
    if len(selected) <= wanted:
        raise UserError(
            f"{len(selected)} rows for {wanted} constants ({', '.join(equation.names)}); sweep "
            f"{wanted + 1} cells or more"
        )
    if not bootstraps:
        return
    seeds = columns.get("seed")
    if seeds is not None and len(np.unique(seeds)) == 1:
        raise UserError(
            f"all {len(selected)} rows have seed={seeds[0]:g}; an interval needs two seeds or "
            "more: train another, or set --bootstraps=0 for a fit without intervals"
        )
    if (count := int(select.clusters(selected.trunks).max()) + 1) < FEWEST_CLUSTERS:
        raise UserError(
            f"{len(selected)} rows, but clusters that share no trunk: {count}; an interval needs "
            f"{FEWEST_CLUSTERS}: train more seeds or cells, or set --bootstraps=0 for a fit "
            "without intervals"
        )


def _is_flat(equation: Equation, columns: Columns, name: str) -> bool:
    """Whether a constant of the equation belongs to this column, which has a single value: then
    the equation's derivatives lose one direction when the column is multiplied.
    """
    theta = solve.starts(equation)[:1]
    both = [{**columns, name: columns[name] * factor} for factor in (1.0, 2.0)]
    slopes = [equation.evaluate(theta, {n: c[n] for n in equation.reads})[1] for c in both]
    return bool(np.any(~np.isclose(slopes[0], slopes[1], rtol=1e-9, atol=0)))


def _condition(
    equation: Equation, data: solve.Data, theta: np.ndarray
) -> tuple[float, tuple[str, ...]]:
    """The condition number of the normalized derivatives, and the constants with the largest parts
    in their weakest direction.
    """
    found = solve.gram(equation, data, np.ones((1, len(data.logs))), theta[None])[0]
    values, vectors = np.linalg.eigh(found)
    parts = np.abs(vectors[:, 0])
    names = [name for name, part in zip(equation.names, parts, strict=True) if part > 0.3]
    return float(np.sqrt(values[-1] / max(values[0], 1e-300))), tuple(names)


def _each_scale(
    equation: Equation, data: solve.Data, selected: Selected, best: np.ndarray
) -> tuple[LeftOut, ...]:
    name = next(
        (n for n in SCALES if n in selected.columns and len(np.unique(selected.columns[n])) > 1),
        None,
    )
    if name is None:
        return ()
    scales = np.unique(selected.columns[name])
    weights = np.array([selected.columns[name] != scale for scale in scales], dtype=np.float64)
    found = solve.resampled(equation, data, weights, best)
    whole, _ = equation.evaluate(best[:1], data.columns)
    rows = []
    for scale, weight, theta in zip(scales, weights, found.theta, strict=True):
        out = weight == 0
        without = np.nan
        if np.isfinite(theta).all():
            other, _ = equation.evaluate(theta[None], data.columns)
            without = float(np.sqrt(np.mean((data.logs - other[0])[out] ** 2)))
        within = float(np.sqrt(np.mean((data.logs - whole[0])[out] ** 2)))
        shown = f"{name}={scale:g}" if isinstance(scale, float) else f"{name}={scale}"
        rows.append(LeftOut(shown, int(out.sum()), within, without))
    return tuple(rows)


def _test(made: Fitted, data: solve.Data, name: str, value: float) -> Test:
    place = made.equation.names.index(name)
    hypothesis = np.log(value) if made.equation.is_log[place] else value
    error = np.sqrt(_covariance(made, data)[place, place])
    statistic = float((made.theta[place] - hypothesis) / error)
    p = float(2 * stats.t.sf(abs(statistic), int(made.clusters.max())))
    low, high = made.intervals[name]
    return Test(name, value, statistic, p, low <= value <= high)


def _covariance(made: Fitted, data: solve.Data) -> np.ndarray:
    """The covariance of theta [P, P]: the sandwich of M-estimation, scores summed over clusters."""
    _, slopes = made.equation.evaluate(made.theta[None], data.columns)
    slopes, size = slopes[0], np.abs(made.residuals)
    delta = made.equation.delta
    scores = slopes * np.clip(made.residuals, -delta, delta)
    bread = np.linalg.inv((slopes * (size <= delta)) @ slopes.T)
    total = int(made.clusters.max()) + 1
    summed = np.stack(
        [np.bincount(made.clusters, weights=column, minlength=total) for column in scores], axis=1
    )
    return bread @ (summed.T @ summed) @ bread * total / (total - 1)
