"""What one setting that is not tuned loses against schedules that are tuned for every budget.

    rows of a sweep (lm/studies/rows.py): a family of schedules without a grid of rates (Power),
    others with one (WSD, cosine), at the same budgets, each a width, a batch and a number of tokens
    -> on the seeds that tune: the best rate of every other family and budget
    -> on the other seeds: loss of the untuned one - loss of the tuned one, paired by seed

The seeds that choose a rate do not judge it: the least of several noisy means is too low, by about
as much as the regret in question. Intervals are of Student's t over the seeds. All budgets of a
seed are one unit, since they share their initial weights and their order of the text.
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


class Regret(NamedTuple):
    """Against a family: of every budget, and the mean over all of them. `rates`: what tuning chose;
    `edges`: budgets at which that was the least or largest rate tried.
    """

    family: str
    rates: Mapping[Budget, float]
    edges: tuple[Budget, ...]
    by_budget: Mapping[Budget, Interval]
    overall: Interval
    seeds: tuple[int, ...]


def regrets(rows: Iterable[Row], untuned: str, tuned_on: Sequence[int]) -> list[Regret]:
    """Of the family `untuned` against every other family in the table.

    Raises:
      UserError: the family is not there or has several rates at a budget, a family lacks a budget
      or a seed, or fewer than four seeds judge.
    """
    losses = _losses(rows)
    if untuned not in losses:
        raise UserError(
            f"no row has schedule {untuned!r}; the table has {', '.join(sorted(losses))}"
        )
    own = {budget: _only(curve, untuned, budget) for budget, curve in losses[untuned].items()}
    others = [family for family in losses if family != untuned]
    if not others:
        raise UserError(f"the table has no schedule but {untuned!r}; add one that is tuned")
    return [_against(family, losses[family], own, set(tuned_on)) for family in others]


Curves = dict[Budget, dict[float, dict[int, float]]]  # budget -> rate -> seed -> loss


def _losses(rows: Iterable[Row]) -> dict[str, Curves]:
    found: dict[str, Curves] = {}
    for row in rows:
        budget = Budget(row["width"], row["batch_tokens"], row["tokens"])
        loss = np.inf if row["loss"] is None else row["loss"]
        curves = found.setdefault(row["schedule"], {}).setdefault(budget, {})
        curves.setdefault(row["learning_rate"], {})[row["seed"]] = loss
    return found


def _only(curve: dict[float, dict[int, float]], family: str, budget: Budget) -> dict[int, float]:
    if len(curve) > 1:
        raise UserError(
            f"{family} has {len(curve)} peak rates at {_told(budget)}; one setting is untuned: "
            "keep the rows of one"
        )
    return next(iter(curve.values()))


def _against(
    family: str, curves: Curves, own: Mapping[Budget, Mapping[int, float]], tuned_on: set[int]
) -> Regret:
    rates, edges, differences = {}, [], {}
    for budget, mine in own.items():
        if budget not in curves:
            raise UserError(f"{family} has no row at {_told(budget)}; train it there too")
        curve = curves[budget]
        tried = {
            rate: float(np.mean([seeds[s] for s in tuned_on]))
            for rate, seeds in sorted(curve.items())
            if tuned_on <= seeds.keys()
        }
        if len(tried) < 2:
            raise UserError(
                f"{family} has {len(tried)} rates at {_told(budget)} with the seeds "
                f"{sorted(tuned_on)}; tuning needs at least two"
            )
        best = min(tried, key=lambda rate: tried[rate])
        rates[budget] = best
        if best in (min(tried), max(tried)):
            edges.append(budget)
        judged = sorted((mine.keys() & curve[best].keys()) - tuned_on)
        differences[budget] = {s: mine[s] - curve[best][s] for s in judged}
    seeds = tuple(sorted(set.intersection(*(set(x) for x in differences.values()))))
    if len(seeds) < FEWEST:
        raise UserError(
            f"{family}: {len(seeds)} seeds beside {sorted(tuned_on)} have every budget; an "
            f"interval needs {FEWEST}"
        )
    table = np.asarray([[differences[budget][s] for s in seeds] for budget in own])
    by_budget = {budget: interval(line) for budget, line in zip(own, table, strict=True)}
    return Regret(family, rates, tuple(edges), by_budget, interval(table.mean(axis=0)), seeds)


def interval(values: np.ndarray) -> Interval:
    """Student's t over independent values; one that is not finite leaves nothing known."""
    mean, count = float(np.mean(values)), len(values)
    half = stats.t.ppf(0.5 + LEVEL / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half))


def plain(found: Sequence[Regret]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {
            "family": one.family,
            "overall": one.overall._asdict(),
            "seeds": list(one.seeds),
            "budgets": [
                {
                    **budget._asdict(),
                    **one.by_budget[budget]._asdict(),
                    "tuned_rate": one.rates[budget],
                    "is_edge": budget in one.edges,
                }
                for budget in one.by_budget
            ],
        }
        for one in found
    ]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """`plain` as Markdown, one table for each family."""
    parts = []
    for one in found:
        all_of_them = _shown(one["overall"])
        head = ("width", "tokens a step", "tokens", "tuned rate", "regret, nats a token")
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for x in one["budgets"]:
            rate = f"{x['tuned_rate']:.4g}" + (" (edge of its grid)" if x["is_edge"] else "")
            cells = (x["width"], f"{x['batch_tokens']:,}", f"{x['tokens']:,}", rate, _shown(x))
            lines.append(f"| {' | '.join(map(str, cells))} |")
        title = f"**Against {one['family']}, tuned at every budget: {all_of_them}**"
        parts.append(title + f" over {len(one['seeds'])} seeds\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _shown(x: Mapping[str, float]) -> str:
    return f"{x['mean']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})"


def _told(budget: Budget) -> str:
    return f"width {budget.width}, {budget.batch_tokens} tokens a step, {budget.tokens:,} tokens"
