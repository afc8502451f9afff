"""Which pattern is better at what, said only where two sources of chance leave no doubt.

Seeds: patterns were trained on the same order of the same data for every seed, which makes a seed a
block. With x_ps the number of pattern p under seed s, r_ps = x_ps - mean_s - mean_p + mean is what
is left to chance, s^2 = sum r^2 / ((P - 1)(S - 1)), and a difference of two patterns' means has the
standard error s sqrt(2 / S) (two-way layout without interaction; Box, Hunter & Hunter 2005, ch. 4).
Its p-values, of every pattern against the first, are corrected by Holm (1979).

Items: the difference of the two, averaged over seeds, under a paired bootstrap of documents or
items (lm/statistics.py), where the task keeps them.

A difference is called significant if its corrected p is below 0.05 and the interval over items
leaves out 0. A task at chance in both patterns has no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lm import statistics
from lm.statistics import Number

ALPHA = 0.05


class Verdict(NamedTuple):
    """`difference` = pattern - against. `low`, `high` over items, `p` over seeds (corrected); None
    where that source of chance could not be measured. `outcome`: better, worse, same (no
    significant difference), or none (at chance).
    """

    task: str
    pattern: str
    against: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    outcome: str
    sentence: str


def judge(
    task: str,
    numbers: Mapping[str, Sequence[Number]],
    *,
    is_better: str,
    unit: str,
) -> list[Verdict]:
    """Every pattern against the first; `numbers[pattern]` one a seed, in the same order."""
    first, *others = numbers
    values = np.array([[x.value for x in row] for row in numbers.values()])
    p_values = seed_p_values(values)
    verdicts = []
    for i, pattern in enumerate(others):
        ours, base = numbers[pattern], numbers[first]
        difference = float(values[i + 1].mean() - values[0].mean())
        items = _over_items(ours, base)
        p = None if p_values is None else float(p_values[i])
        at_chance = all(x.is_at_chance for x in (*ours, *base))
        outcome = _outcome(difference, items, p, is_better) if not at_chance else "none"
        sentence = _sentence(task, (pattern, first), values[[i + 1, 0]].mean(1), outcome, unit)
        sentence += _evidence(items, p, len(base), base[0].num) if outcome != "none" else ""
        low, high = items or (None, None)
        verdicts.append(
            Verdict(task, pattern, first, difference, low, high, p, outcome, sentence + ".")
        )
    return verdicts


def seed_p_values(values: np.ndarray) -> np.ndarray | None:
    """values [P, S] -> Holm's corrected p of rows 1.. against row 0; None with fewer than two
    seeds or patterns.
    """
    patterns, seeds = values.shape
    if patterns < 2 or seeds < 2:
        return None
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    dof = (patterns - 1) * (seeds - 1)
    error = np.sqrt(np.sum(rest**2) / dof * 2 / seeds)
    difference = values[1:].mean(1) - values[0].mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(difference == 0, 0.0, np.abs(difference) / error)
    return holm(2 * stats.t.sf(t, dof))


def holm(p: np.ndarray) -> np.ndarray:
    """Step-down correction of p-values.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    scaled = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(scaled, 1.0)
    return found


def _over_items(ours: Sequence[Number], base: Sequence[Number]) -> tuple[float, float] | None:
    """The interval of the difference over items, averaged over seeds first."""
    kept = [x.units for x in (*ours, *base) if x.units is not None]
    if len(kept) < len(ours) + len(base) or len({units.shape for units in kept}) > 1:
        return None
    means = (np.mean(kept[: len(ours)], axis=0), np.mean(kept[len(ours) :], axis=0))
    sides = (statistics.ratio(x[:, 0], x[:, 1], keep_units=True) for x in means)
    found = statistics.difference(*sides)
    return found.low, found.high


def _outcome(
    difference: float, items: tuple[float, float] | None, p: float | None, is_better: str
) -> str:
    """Both sources of chance must leave no doubt, and at least that of seeds must be known."""
    sure = p is not None and p < ALPHA and (items is None or not items[0] <= 0 <= items[1])
    if not sure:
        return "same"
    return "better" if (difference > 0) == (is_better == "higher") else "worse"


def _sentence(task: str, names: tuple[str, str], means: np.ndarray, outcome: str, unit: str) -> str:
    ours, base = (f"{x:.4g}" for x in means)
    if outcome == "none":
        return f"{task}: {names[0]} ({ours}) and {names[1]} ({base}) are at chance; no verdict"
    words = {
        "better": "is better than",
        "worse": "is worse than",
        "same": "does not differ significantly from",
    }
    return f"{task}: {names[0]} ({ours} {unit}) {words[outcome]} {names[1]} ({base} {unit})"


def _evidence(items: tuple[float, float] | None, p: float | None, seeds: int, num: int) -> str:
    if p is None:
        over_seeds = "one seed says nothing of others"
    else:
        over_seeds = (
            f"p = {p:.2g} over {seeds} seeds" if p >= 1e-4 else f"p < 1e-4 over {seeds} seeds"
        )
    if items is None:
        return f"; {over_seeds}"
    return f"; {over_seeds}, 95 % over {num} units {items[0]:+.3g} to {items[1]:+.3g}"


def shortened(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict for all patterns of a task where none of them is above chance."""
    found = []
    for task in dict.fromkeys(verdict.task for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.task == task]
        if all(verdict.outcome == "none" for verdict in own):
            sentence = f"{task}: every pattern is at chance; no verdict."
            own = [own[0]._replace(pattern="every pattern", sentence=sentence)]
        found += own
    return found


def to_mapping(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Plain values for JSON."""
    return [verdict._asdict() for verdict in verdicts]
