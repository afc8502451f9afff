"""Which pattern is better at what, said only where two sources of chance leave no doubt.

Seeds: patterns were trained on the same order of the same data for every seed, which makes a seed a
block. With x_ps the number of pattern p under seed s, r_ps = x_ps - mean_s - mean_p + mean is what
is left to chance, s^2 = sum r^2 / ((P - 1)(S - 1)), and a difference of two patterns' means has the
standard error s sqrt(2 / S) (two-way layout without interaction; Box, Hunter & Hunter 2005, ch.
4). Only patterns that were trained have a place in the layout: a variant reads the runs of another,
and its row would count the same chance twice. It is compared with the first by itself, which is the
paired t-test over seeds. All p-values are corrected together by Holm (1979); where nothing is left
to chance (equal differences with every seed) there is none.

Items: the difference of the two, averaged over seeds, under a paired bootstrap of documents or
items (lm/evaluation/statistics.py), where the task keeps them.

A difference is called significant if its corrected p is below 0.05 and the interval over items
leaves out 0. A task at chance in both patterns has no verdict, nor has one with a value that is not
finite, which is left out of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy import special

from lm.evaluation import statistics
from lm.evaluation.statistics import Number
from lm.report.compared import Verdict

ALPHA = 0.05
NOTHING = 1e-9  # a residual below that share of the values is rounding


def judge(
    task: str,
    numbers: Mapping[str, Sequence[Number]],
    *,
    is_better: str,
    unit: str,
    variants: Collection[str] = (),
) -> list[Verdict]:
    """Every pattern against the first; `numbers[pattern]` one a seed, in the same order.
    `variants`: those of them that were not trained.
    """
    first, *others = numbers
    values = {name: np.array([x.value for x in row]) for name, row in numbers.items()}
    finite = {name: x for name, x in values.items() if np.isfinite(x).all()}
    p_values = seed_p_values(finite, variants) if first in finite else {}
    verdicts = []
    for pattern in others:
        if pattern not in p_values:
            lost = pattern if pattern not in finite else first
            sentence = f"{task}: {lost} diverged; no verdict on {pattern} against {first}."
            nothing = (None, None, None, None)
            verdicts.append(Verdict(task, pattern, first, *nothing, "diverged", sentence))
            continue
        ours, base = numbers[pattern], numbers[first]
        means = float(values[pattern].mean()), float(values[first].mean())
        difference, p = means[0] - means[1], p_values[pattern]
        items = _over_items(ours, base)
        at_chance = all(x.is_at_chance for x in (*ours, *base))
        outcome = _outcome(difference, items, p, is_better) if not at_chance else "none"
        sentence = _sentence(task, (pattern, first), means, outcome, unit)
        sentence += _evidence(items, p, len(base), base[0].num) if outcome != "none" else ""
        low, high = items if items and not math.isnan(items[0]) else (None, None)
        verdicts.append(
            Verdict(task, pattern, first, difference, low, high, p, outcome, sentence + ".")
        )
    return verdicts


def seed_p_values(
    values: Mapping[str, np.ndarray], variants: Collection[str] = ()
) -> dict[str, float | None]:
    """values[name] [S] -> Holm's corrected p of every name against the first; None where it cannot
    be measured: with one seed, or with nothing left to chance.
    """
    first, *trained = (name for name in values if name not in variants)
    found = dict(zip(trained, _layout([values[first], *(values[x] for x in trained)]), strict=True))
    found |= {x: _layout([values[first], values[x]])[0] for x in values if x in variants}
    known = {name: p for name, p in found.items() if not math.isnan(p)}
    corrected = dict(zip(known, holm(np.array(list(known.values()))).tolist(), strict=True))
    return {name: corrected.get(name) for name in values if name != first}


def _layout(rows: Sequence[np.ndarray]) -> list[float]:
    """p of rows 1.. [S] against row 0, not corrected; nan where it cannot be measured."""
    values = np.stack(rows)
    patterns, seeds = values.shape
    if patterns < 2 or seeds < 2:
        return [math.nan] * (patterns - 1)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    dof = (patterns - 1) * (seeds - 1)
    error = float(np.sqrt(np.sum(rest**2) / dof * 2 / seeds))
    difference = np.abs(values[1:].mean(1) - values[0].mean())
    if error <= NOTHING * np.abs(values).max():
        return [1.0 if x == 0 else math.nan for x in difference]
    return (2 * special.stdtr(dof, -difference / error)).tolist()


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
    leave_none = items is None or items[0] > 0 or items[1] < 0  # neither, of one unit: nan
    if p is None or p >= ALPHA or not leave_none:
        return "same"
    return "better" if (difference > 0) == (is_better == "higher") else "worse"


def _sentence(
    task: str, names: tuple[str, str], means: tuple[float, float], outcome: str, unit: str
) -> str:
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
    if seeds == 1:
        over_seeds = "one seed says nothing of others"
    elif p is None:
        over_seeds = f"equal differences over {seeds} seeds give no p"
    else:
        over_seeds = f"p {'< 1e-4' if p < 1e-4 else f'= {p:.2g}'} over {seeds} seeds"
    if items is None:
        return f"; {over_seeds}"
    if math.isnan(items[0]):
        return f"; {over_seeds}, {num} unit{'s' * (num > 1)}: no interval"
    if items == (0, 0):
        return f"; {over_seeds}, none of {num} units differs"
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
