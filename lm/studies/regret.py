"""The loss of one untuned setting against schedules that are tuned for every budget.

    rows of a sweep (lm/studies/rows.py): a family of schedules without a grid of rates (Power),
    others with one (WSD, cosine), at the same budgets (width, batch and number of tokens)
    -> on the seeds for tuning: the best rate of every other family and budget
    -> on the other seeds: loss of the untuned one - loss of the tuned one, paired by seed

The seeds that choose a rate do not judge it: the smallest of several noisy means is too low, by
about as much as the regret in question. Intervals are by Student's t over the seeds. All budgets of
a seed are one unit, because they share their initial weights and their order of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lm.mapping import UserError

FEWEST = 4  # seeds that judge
LEVEL = 0.95

Row = Mapping[str, Any]


class Budget(NamedTuple):
    """What a learning rate is tuned for."""

    width: int
    batch_tokens: int
    tokens: int


class Interval(NamedTuple):
    """Mean over seeds and the ends of the 95 % interval, nats a token."""

    mean: float
    low: float
    high: float


class Tuned(NamedTuple):
    """The rates of a family that were tried at a budget with the seeds for tuning. `losses`: peak
    rate -> mean loss over those seeds, by rising rate; inf where one diverged.
    """

    losses: Mapping[float, float]

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def is_edge(self) -> bool:
        """Whether that is the smallest or largest rate tried: a better one may lie beyond."""
        return self.best in (min(self.losses), max(self.losses))


class Regret(NamedTuple):
    """The regret against one family: for every budget, and the mean over all budgets. `tuned` is
    what the seeds for tuning found for the family. `own` is the mean loss of the untuned setting
    over the same seeds, None if it lacks one of them. `seeds` are those that judge.
    """

    family: str
    tuned: Mapping[Budget, Tuned]
    own: Mapping[Budget, float | None]
    by_budget: Mapping[Budget, Interval]
    overall: Interval
    seeds: tuple[int, ...]


def regrets(rows: Iterable[Row], untuned: str, tuned_on: Sequence[int]) -> list[Regret]:
    """The regret of the family `untuned` against every other family in the table.

    Raises:
      UserError: the family is missing or has several rates at a budget, a family lacks a budget or
      a seed, or fewer than four seeds judge.
    """
    losses = _losses(rows)
    if untuned not in losses:
        raise UserError(
            f"no row has schedule {untuned!r}; the table has "
            f"{', '.join(sorted(losses)) or 'no row'}"
        )
    own = losses[untuned]
    for budget, curve in own.items():
        _check_one_rate(curve, untuned, budget)
    others = [family for family in losses if family != untuned]
    if not others:
        raise UserError(f"the table has no schedule but {untuned!r}; add one that is tuned")
    return [_against(family, losses[family], own, set(tuned_on)) for family in others]


Curve = dict[float, dict[int, float]]  # rate -> seed -> loss
Curves = dict[Budget, Curve]


def _losses(rows: Iterable[Row]) -> dict[str, Curves]:
    found: dict[str, Curves] = {}
    for row in rows:
        budget = Budget(row["width"], row["batch_tokens"], row["tokens"])
        loss = np.inf if row["loss"] is None else row["loss"]
        curve = found.setdefault(row["schedule"], {}).setdefault(budget, {})
        seeds = curve.setdefault(row["learning_rate"], {})
        if row["seed"] in seeds:
            raise UserError(
                f"two rows of {row['schedule']} with rate {row['learning_rate']:g} and seed "
                f"{row['seed']} at {_spelled(budget)}; they differ in something else: keep one kind"
            )
        seeds[row["seed"]] = loss
    return found


def _check_one_rate(curve: Curve, family: str, budget: Budget) -> None:
    if len(curve) > 1:
        raise UserError(
            f"{family} has {len(curve)} peak rates at {_spelled(budget)}; one setting is untuned: "
            "keep the rows of one"
        )


def _tried(curve: Curve, seeds: set[int]) -> dict[float, float]:
    """Mean losses of the rates that all of these seeds have."""
    return {
        rate: float(np.mean([curve[rate][seed] for seed in seeds]))
        for rate in sorted(curve)
        if seeds <= curve[rate].keys()
    }


def _against(
    family: str, curves: Curves, own: Mapping[Budget, Curve], tuned_on: set[int]
) -> Regret:
    found, before, differences = {}, {}, {}
    for budget, curve in own.items():
        if budget not in curves:
            raise UserError(f"{family} has no row at {_spelled(budget)}; train it there too")
        found[budget] = tried = Tuned(_tried(curves[budget], tuned_on))
        if len(tried.losses) < 2:
            raise UserError(
                f"{family} has {len(tried.losses)} rates at {_spelled(budget)} with the seeds "
                f"{sorted(tuned_on)}; tuning needs at least two"
            )
        if not np.isfinite(tried.losses[tried.best]):
            raise UserError(
                f"{family} diverged at every rate tried at {_spelled(budget)}; train lower ones"
            )
        before[budget] = next(iter(_tried(curve, tuned_on).values()), None)
        (mine,), others = curve.values(), curves[budget][tried.best]
        judged = sorted((mine.keys() & others.keys()) - tuned_on)
        for seed in judged:
            if not np.isfinite(mine[seed]) or not np.isfinite(others[seed]):
                raise UserError(
                    f"seed {seed} diverged at {_spelled(budget)}, so that there is no mean regret "
                    f"against {family}; leave that budget out"
                )
        differences[budget] = {s: mine[s] - others[s] for s in judged}
    seeds = tuple(sorted(set.intersection(*(set(x) for x in differences.values()))))
    if len(seeds) < FEWEST:
        raise UserError(
            f"{family}: {len(seeds)} seeds beside {sorted(tuned_on)} have every budget; an "
            f"interval needs {FEWEST}"
        )
    table = np.asarray([[differences[budget][s] for s in seeds] for budget in own])
    by_budget = {budget: interval(line) for budget, line in zip(own, table, strict=True)}
    return Regret(family, found, before, by_budget, interval(table.mean(axis=0)), seeds)


def interval(values: np.ndarray) -> Interval:
    """Student's t over independent values; infinite or NaN if one value is not finite."""
    mean, count = float(np.mean(values)), len(values)
    half = stats.t.ppf(0.5 + LEVEL / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half))


def plain(found: Sequence[Regret]) -> list[dict[str, Any]]:
    """Plain values for JSON; a loss that is not finite is None."""
    return [
        {
            "family": one.family,
            "overall": one.overall._asdict(),
            "seeds": list(one.seeds),
            "budgets": [_plain_budget(one, budget) for budget in one.by_budget],
        }
        for one in found
    ]


def _plain_budget(one: Regret, budget: Budget) -> dict[str, Any]:
    tried, finite = one.tuned[budget], lambda x: x if x is not None and np.isfinite(x) else None
    return {
        **budget._asdict(),
        **one.by_budget[budget]._asdict(),
        "tuned_rate": tried.best,
        "is_edge": tried.is_edge,
        "losses": [[rate, finite(loss)] for rate, loss in tried.losses.items()],
        "own_loss": finite(one.own[budget]),
    }


def _spelled(budget: Budget) -> str:
    return f"width {budget.width}, {budget.batch_tokens} tokens a step, {budget.tokens:,} tokens"
