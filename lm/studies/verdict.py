"""Which pattern is better at what: a verdict only if two sources of chance leave no doubt.

A comparison is between two patterns on one task. It is tested on its own differences, whether the
patterns were trained or are readings of trained runs. Under the same seed two patterns saw the same
data in the same order, so the seeds form pairs.

Seeds: with d_s the difference under seed s, the test is Student's paired t of d over seeds. It uses
no other patterns: one that explodes has far more noise than the others, and a common estimate would
be wrong for all of them. With fewer than three seeds there is no verdict. With three, the test
finds a difference of ten times the noise, but hardly one of five times (the power is simulated in
tests/lm/studies/test_verdict.py).

Items: the difference of the two, averaged over seeds, with its interval over documents or items
(lm/evaluation/statistics.py), where the task keeps them.

Among sixty differences three have p < 0.05 by chance. Therefore a study names in advance the
comparisons that its question rests on, at most five. Their p-values are corrected together by Holm
(1979), over all that were named. A named difference is called significant if its corrected p is
below 0.05 and the interval over items excludes 0. All other differences are reported with their
intervals and without a verdict. There is no verdict on a task at chance in both patterns, or with a
value that is not finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from lm.evaluation import statistics
from lm.mapping import UserError, nearest
from lm.report.compared import Asked, Comparison, Difference, Row

ALPHA = 0.05
MOST_PRIMARY = 5
FEWEST_SEEDS = 3
DIGITS = 9  # decimals of a difference; anything smaller is rounding
NOTHING = 1e-9  # a spread below this share of the values is rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Primary:
    """A comparison that a study names before it is run.

    Attributes:
      task: label of the task whose headline decides
      pattern: a pattern or variant
      against: the pattern or variant that it is compared with
    """

    task: str
    pattern: str
    against: str


def check(primary: Sequence[Primary], patterns: Collection[str], tasks: Collection[str]) -> None:
    """Raises:
    UserError: too many comparisons, one twice, or a task or pattern that is not in the study.
    """
    if len(primary) > MOST_PRIMARY:
        raise UserError(
            f"config.primary names {len(primary)} comparisons; name at most {MOST_PRIMARY}, for "
            "every one more makes all of them harder to show"
        )
    for i, one in enumerate(primary):
        for key, known in (("task", tasks), ("pattern", patterns), ("against", patterns)):
            if (value := getattr(one, key)) not in known:
                advice = "" if key == "task" else "set config.primary too; "
                raise UserError(
                    f"config.primary[{i}].{key}={value!r} is not in the study; "
                    f"{advice}{nearest(value, known)}"
                )
        if one.pattern == one.against:
            raise UserError(f"config.primary[{i}] compares {one.pattern!r} with itself; name two")
        pair = {one.pattern, one.against}
        if any(x.task == one.task and {x.pattern, x.against} == pair for x in primary[:i]):
            raise UserError(
                f"config.primary names {one.pattern!r} and {one.against!r} at {one.task!r} twice; "
                "name it once"
            )


def judge(
    rows: Sequence[Row], primary: Sequence[Primary], seeds: Sequence[int]
) -> list[Difference]:
    """The verdicts on all primary comparisons, in their order. `seeds`: all those of the study, of
    which the rows may have only the first few.
    """
    found = [_measured(rows, one) for one in primary]
    tests = [_test(rows, one) for one in primary]
    return [
        _verdict(rows, one, difference, _Evidence(p, len(primary), seeds))
        for one, difference, p in zip(primary, found, corrected(tests), strict=True)
    ]


def rest(rows: Sequence[Row], primary: Sequence[Primary]) -> list[Difference]:
    """Every other pattern against the first on every task, except primary comparisons: differences
    and intervals.
    """
    first, *others = [row.pattern for row in rows]
    every = [
        Primary(task=task, pattern=pattern, against=first)
        for task in rows[0].tasks
        for pattern in others
    ]
    turned = [dataclasses.replace(x, pattern=x.against, against=x.pattern) for x in primary]
    return [_measured(rows, one) for one in every if one not in (*primary, *turned)]


def recheck(found: Comparison, primary: Sequence[Primary] = ()) -> tuple[list[str], bool]:
    """The verdicts of a comparison, computed again from its numbers: one line each, and whether all
    of them stand. `primary` are the comparisons to judge; by default those that the page names.

    Raises:
      UserError: there is nothing to judge, or a comparison with something the page does not hold.
    """
    asked = list(primary) or [Primary(**one) for one in found.primary]
    if not asked:
        raise UserError(
            "the page names no primary comparison; name those to judge in a config's `primary` and "
            "give it with --config"
        )
    check(asked, [row.pattern for row in found.rows], found.rows[0].tasks)
    before = {(x.task, x.pattern, x.against): x for x in found.verdicts}
    lines, all_stand = [], True
    for new in judge(found.rows, asked, found.seeds):
        old = before.get((new.task, new.pattern, new.against))
        if old is None:
            lines.append(f"new: {new.sentence}")
        elif old.outcome == new.outcome:
            lines.append(f"stands: {new.sentence}")
        else:
            lines.append(f"does not stand: {new.sentence} It was: {old.sentence}")
            all_stand = False
    return lines, all_stand


def seed_p_values(
    values: Mapping[str, np.ndarray], variants: Collection[str] = ()
) -> dict[str, float | None]:
    """values[name] [S] -> Holm's corrected p of every name against the first; None where it cannot
    be computed: too few seeds, or no random differences. `variants` are the names that were not
    trained; they are tested like all others.
    """
    first, *others = values
    assert set(variants) <= set(others), "a variant has values of its own"
    found = {name: p_value(values[name] - values[first], values[first]) for name in others}
    return dict(zip(found, corrected([*found.values()]), strict=True))


def p_value(differences: np.ndarray, values: np.ndarray) -> float | None:
    """The p of the paired t-test over seeds, not corrected. `values` [S] set the scale of the
    differences [S]. It is 1 if all differences are 0, and None if they are otherwise equal or too
    few.
    """
    seeds = len(differences)
    if seeds < FEWEST_SEEDS or not np.isfinite(differences).all():
        return None
    scale = float(max(np.abs(values).max(), np.abs(differences).max())) or 1.0
    values, differences = values / scale, differences / scale  # squares neither overflow nor vanish
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    if spread <= NOTHING * float(np.abs(values).max() + np.abs(differences).max()):
        return 1.0 if abs(mean) <= NOTHING * float(np.abs(values).max()) else None
    return float(2 * special.stdtr(seeds - 1, -abs(mean) / (spread / math.sqrt(seeds))))


def over_seeds(differences: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the mean of [S] by Student's t; None for one seed."""
    seeds = len(differences)
    if seeds < 2 or not np.isfinite(differences).all():
        return None, None
    error = float(differences.std(ddof=1)) / math.sqrt(seeds)
    half = float(special.stdtrit(seeds - 1, 0.5 + statistics.CONFIDENCE / 2)) * error
    return float(differences.mean()) - half, float(differences.mean()) + half


def corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrected by Holm. A comparison without a p still counts among those named together: leaving
    it out would be a choice made after looking.
    """
    found = holm(np.array([1.0 if p is None else p for p in p_values]))
    return [None if p is None else float(c) for p, c in zip(p_values, found, strict=True)]


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


def _sides(rows: Sequence[Row], one: Primary) -> tuple[Asked, Asked]:
    by_name = {row.pattern: row.tasks[one.task] for row in rows}
    return by_name[one.pattern], by_name[one.against]


def _test(rows: Sequence[Row], one: Primary) -> float | None:
    ours, base = (side.headlines for side in _sides(rows, one))
    return p_value(ours - base, base)


def _measured(rows: Sequence[Row], one: Primary) -> Difference:
    """The difference and its intervals, or why there is nothing to report."""
    ours, base = _sides(rows, one)
    differences = ours.headlines - base.headlines
    what = one.task if one.task == ours.headline else f"{one.task} {ours.headline}"
    found = Difference(what, one.pattern, one.against, ours.unit)
    if not np.isfinite(differences).all():
        return found._replace(outcome="diverged")
    low, high = _over_items(ours, base) or (None, None)
    if low is not None and math.isnan(low):
        low = high = None
    seeds_low, seeds_high = over_seeds(np.round(differences, DIGITS))
    at_chance = all(
        seed.numbers[side.headline].is_at_chance for side in (ours, base) for seed in side.seeds
    )
    return found._replace(
        difference=round(float(differences.mean()), DIGITS),
        seeds_low=seeds_low,
        seeds_high=seeds_high,
        low=low,
        high=high,
        outcome="at chance" if at_chance else "",
    )


def _over_items(ours: Asked, base: Asked) -> tuple[float, float] | None:
    """The interval of the difference over items, after averaging over seeds; nan for one item."""
    sides = []
    for side in (ours, base):
        kept = [seed.numbers[side.headline].units for seed in side.seeds]
        known = [units for units in kept if units is not None]
        if len(known) < len(kept) or len({units.shape for units in known}) > 1:
            return None
        mean = np.mean(known, axis=0)
        sides.append(statistics.ratio(mean[:, 0], mean[:, 1], keep_units=True))
    ours_kept, base_kept = (side.units for side in sides)
    if ours_kept is None or base_kept is None or ours_kept.shape != base_kept.shape:
        return None
    found = statistics.difference(*sides)
    return found.low, found.high


class _Evidence(NamedTuple):
    """The corrected p over seeds, how many comparisons it is corrected for, and the seeds of the
    study.
    """

    p: float | None
    num_primary: int
    seeds: Sequence[int]


def _verdict(
    rows: Sequence[Row], one: Primary, found: Difference, evidence: _Evidence
) -> Difference:
    ours, base = _sides(rows, one)
    p, names = evidence.p, f"{one.pattern} and {one.against}"
    if found.outcome == "diverged":
        sides = (one.pattern, ours), (one.against, base)
        lost = [n for n, x in sides if _is_lost(x)] or [n for n, _ in sides]  # or their difference
        return found._replace(
            sentence=f"{found.task}: {' and '.join(lost)} diverged; no verdict on {names}."
        )
    means = [f"{side.headlines.mean():.4g}" for side in (ours, base)]
    if found.outcome == "at chance":
        return found._replace(
            sentence=f"{found.task}: {one.pattern} ({means[0]}) and {one.against} ({means[1]}) "
            "are at chance; no verdict."
        )
    outcome = _outcome(found, p, base)
    words = {
        "better": "is better than",
        "worse": "is worse than",
        "same": "does not differ significantly from",
        "none": "has no verdict against",
    }
    sentence = (
        f"{found.task}: {one.pattern} ({means[0]} {ours.unit}) {words[outcome]} {one.against} "
        f"({means[1]} {base.unit}); {_evidence(evidence, len(base.seeds))}; difference "
        f"{found.difference:+.3g}{_intervals(found, base)}."
    )
    return found._replace(p=p, outcome=outcome, sentence=sentence)


def _is_lost(side: Asked) -> bool:
    return not np.isfinite(side.headlines).all()


def _outcome(found: Difference, p: float | None, base: Asked) -> str:
    """Both sources of chance must leave no doubt; without items, that of the seeds."""
    if len(base.seeds) < FEWEST_SEEDS or p is None:
        return "none"
    assert found.difference is not None
    if found.low is None or found.high is None:
        no_doubt = _num_items(base) != 1
    else:
        no_doubt = found.low > 0 or found.high < 0
    if p >= ALPHA or not no_doubt:
        return "same"
    return "better" if (found.difference > 0) == (base.is_better == "higher") else "worse"


def _num_items(side: Asked) -> int:
    return side.seeds[0].numbers[side.headline].num


def _evidence(evidence: _Evidence, num_seeds: int) -> str:
    p, num_primary, _ = evidence
    seeds = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
    if num_seeds < FEWEST_SEEDS:
        be = "are" if num_seeds > 1 else "is"
        return f"{seeds} {be} too few, train {FEWEST_SEEDS} or more{_more_seeds(evidence.seeds)}"
    if p is None:
        return f"equal differences over {seeds} leave nothing to test"
    among = f", corrected for {num_primary} comparisons" if num_primary > 1 else ""
    return f"p {'< 1e-4' if p < 1e-4 else f'= {p:.2g}'} over {seeds}{among}"


def _more_seeds(seeds: Sequence[int]) -> str:
    """The flag that adds what is missing; "" if the study has enough and is still being trained.

    >>> _more_seeds((0, 1))
    ': --config.seeds="(0,1,2)"'
    """
    missing = FEWEST_SEEDS - len(seeds)
    more = [*seeds, *(max(seeds) + 1 + i for i in range(missing))]
    return f': --config.seeds="({",".join(map(str, more))})"' if missing > 0 else ""


def _intervals(found: Difference, side: Asked) -> str:
    """Both intervals, for people."""
    over, num = [], _num_items(side)
    if found.seeds_low is not None:
        over.append(f"{found.seeds_low:+.3g} to {found.seeds_high:+.3g} over seeds")
    if found.low is not None and (found.low, found.high) != (0, 0):
        over.append(f"{found.low:+.3g} to {found.high:+.3g} over {num} units")
    text = f", 95 % {' and '.join(over)}" if over else ""
    if found.low is not None:
        return text if found.low or found.high else f"{text}; none of {num} units differs"
    return text + ("; one unit has no interval" if num == 1 else "; no units were kept")
