"""Verdicts, compared with scipy's tests, on planted differences and at chance, and their error
rates.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lm.evaluation import statistics
from lm.evaluation.statistics import Number
from lm.mapping import UserError
from lm.report import compared
from lm.report.compared import Answer, Asked, Comparison, Difference, Row
from lm.studies import verdict
from lm.studies.verdict import Primary
from tests.lm.studies.rows import row

ROOT = Path(__file__).parents[3]


def planted(
    gap: float, seeds: int = 3, noise: float = 0.003, docs: int = 60
) -> dict[str, list[Number]]:
    """Bits per byte of three patterns on the same documents.

    The third pattern is `gap` above the first. Seeds and documents shift all patterns alike.
    """
    rng = np.random.default_rng(0)
    base, sizes = rng.normal(2.0, 0.3, docs), rng.integers(100, 1000, docs).astype(float)
    shift = rng.normal(0, 0.1, seeds)
    found: dict[str, list[Number]] = {}
    for pattern, extra in (("first", 0.0), ("twin", 0.0), ("third", gap)):
        by_seed = []
        for s in range(seeds):
            bits = base + shift[s] + extra + rng.normal(0, noise) + rng.normal(0, noise, docs)
            by_seed.append(statistics.ratio(bits * sizes, sizes, keep_units=True))
        found[pattern] = by_seed
    return found


def rows_of(numbers: dict[str, list[Number]], is_better: str = "lower") -> list[Row]:
    return [
        row(
            name,
            tasks={
                "bits": Asked(
                    headline="bits",
                    is_better=is_better,  # pyright: ignore[reportArgumentType]
                    unit="bits per byte",
                    seeds=tuple(Answer({"bits": number}, None) for number in by_seed),
                )
            },
        )
        for name, by_seed in numbers.items()
    ]


def judged(numbers: dict[str, list[Number]], is_better: str = "lower") -> list[Difference]:
    """Compares every pattern with the first, as primary comparisons."""
    first, *others = numbers
    asked = [Primary(task="bits", pattern=name, against=first) for name in others]
    return verdict.judge(rows_of(numbers, is_better), asked, range(len(numbers[first])))


def p_values(values: np.ndarray) -> dict[str, float | None]:
    """p values of patterns named by their row in `values` [P, S]."""
    return verdict.seed_p_values({str(i): row for i, row in enumerate(values)})


def test_a_planted_difference_is_found_and_a_twin_is_not() -> None:
    twin, third = judged(planted(0.05))
    assert (twin.outcome, third.outcome) == ("same", "worse")
    assert third.difference == pytest.approx(0.05, abs=0.01)
    assert third.p is not None
    assert third.low is not None
    assert third.seeds_low is not None
    assert third.p < 0.05 < (twin.p or 0)
    assert min(third.low, third.seeds_low) > 0
    assert "third (" in third.sentence
    assert "is worse than first" in third.sentence
    assert "corrected for 2 comparisons" in third.sentence
    assert [v.outcome for v in judged(planted(0.05), "higher")] == ["same", "better"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_give_no_verdict(seeds: int) -> None:
    """Even if documents agree clearly, another seed might reverse the result."""
    found = judged(planted(0.5, seeds=seeds))
    assert [v.outcome for v in found] == ["none", "none"]
    assert found[1].p is None
    assert found[1].low is not None
    assert 'too few, train 3 or more: --config.seeds="(0,1,2)";' in found[1].sentence
    assert (found[1].seeds_low is None) == (seeds == 1)


def test_documents_can_withhold_a_verdict() -> None:
    """One document of thirty makes all of the difference, so seeds agree and documents do not."""
    numbers = planted(0.0, noise=1e-4, docs=30)
    for i, number in enumerate(numbers["third"]):
        assert number.units is not None
        units = number.units.copy()
        units[0, 0] *= 1.5
        numbers["third"][i] = statistics.ratio(units[:, 0], units[:, 1], keep_units=True)
    third = judged(numbers)[1]
    assert third.p is not None
    assert third.p < 0.05
    assert third.outcome == "same"


def test_at_chance_has_no_verdict() -> None:
    coin = np.arange(400) % 2
    even = [statistics.share(coin, chance=0.5)] * 3
    found = judged({"a": even, "b": even}, "higher")
    assert found[0].outcome == "at chance"
    assert "at chance; no verdict" in found[0].sentence
    sure = [
        statistics.share(np.ones(400), chance=0.5),
        *[statistics.share(coin + 1 > 1, chance=0.5)] * 2,
    ]
    assert judged({"a": even, "b": sure}, "higher")[0].outcome != "at chance"


def test_p_is_that_of_a_paired_t_test_of_the_two() -> None:
    """A third pattern does not change it. A variant, which shares another pattern's runs, is tested
    like any pattern.
    """
    values = np.random.default_rng(0).normal(size=(3, 6))
    paired = [stats.ttest_rel(values[x], values[0]).pvalue for x in (1, 2)]
    wanted = verdict.holm(np.array(paired)).tolist()
    assert [p_values(values)[x] for x in "12"] == pytest.approx(wanted)
    values[2] *= 1000
    named = dict(zip("012", values, strict=True))
    noisy = stats.ttest_rel(values[2], values[0]).pvalue
    wanted = verdict.holm(np.array([paired[0], noisy])).tolist()
    assert list(verdict.seed_p_values(named, "2").values()) == pytest.approx(wanted)


UNEQUAL = ([1, 1, 1, 1], [1000, 1, 1, 1], [1, 1, 1, 5], [5] + 5 * [1])


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", UNEQUAL, ids=str)
def test_false_alarms_are_as_rare_as_they_say(spread: list[float], seeds: int) -> None:
    """Of 1,000 studies without a real difference, at most 5 % (and two standard errors) call some
    pattern better or worse, even if patterns have very different noise. Pooled residuals would call
    15 to 27 %.
    """
    rng = np.random.default_rng(seeds)
    alarms = 0
    for _ in range(1000):
        noise = np.array(spread)[:, None] * rng.standard_normal((len(spread), seeds))
        found = p_values(rng.standard_normal(seeds) * 10 + noise)
        alarms += min(1.0 if p is None else p for p in found.values()) < verdict.ALPHA
    assert alarms / 1000 < 0.05 + 2 * 0.007


def test_verdicts_that_need_documents_too_are_as_rare() -> None:
    """Of 200 studies of equal patterns on documents of different sizes, less than 5 % have a
    verdict, since it needs seeds and documents to agree.
    """
    alarms = 0
    rng = np.random.default_rng(1)
    for _ in range(200):
        sizes = np.exp(rng.standard_normal(12))
        numbers = {
            name: [
                statistics.ratio(
                    sizes * (2 + rng.normal(0, noise) + rng.normal(0, noise, 12)),
                    sizes,
                    keep_units=True,
                )
                for _ in range(3)
            ]
            for name, noise in (("a", 0.01), ("b", 0.01), ("c", 0.3))
        }
        alarms += any(v.outcome in ("better", "worse") for v in judged(numbers))
    assert alarms / 200 < 0.05


@pytest.mark.parametrize(
    ("seeds", "effect", "least", "most"),
    [(2, 10, 0.0, 0.0), (3, 5, 0.3, 0.6), (3, 15, 0.9, 1.0), (5, 5, 0.95, 1.0), (5, 2, 0.2, 0.6)],
)
@pytest.mark.parametrize("other", [1.0, 1000.0])
def test_power(seeds: int, effect: float, least: float, most: float, other: float) -> None:
    """How often a difference of `effect` standard deviations of one run is found, among two
    comparisons. The noise of the other pattern does not lower that.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values = rng.standard_normal((3, seeds)) * np.array([1, 1, other])[:, None]
        values[1] += effect
        found = p_values(values)["1"]
        hits += found is not None and found < verdict.ALPHA
    assert least <= hits / 400 <= most, hits / 400


def test_equal_numbers_are_not_a_difference() -> None:
    assert p_values(np.ones((3, 3))) == {"1": 1.0, "2": 1.0}
    assert p_values(np.ones((1, 3))) == {}
    assert p_values(np.ones((2, 2))) == {"1": None}


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_p_does_not_depend_on_the_unit(scale: float) -> None:
    """Squares of such numbers underflow or overflow."""
    found = verdict.p_value(np.array([1.0, 2.0, 3.0]) * scale, np.array([5.0, 4.0, 6.0]) * scale)
    assert found == pytest.approx(0.0741799, rel=1e-6)


def test_units_without_a_size_give_no_interval() -> None:
    empty = np.stack([np.ones(30), np.zeros(30)], 1)
    numbers = {
        name: [dataclasses.replace(number, units=empty) for number in row]
        for name, row in planted(0.05).items()
    }
    assert [x.low for x in judged(numbers)] == [None, None]


def test_equal_differences_give_no_p() -> None:
    """Without spread there is nothing to test, which does not prove a difference: the seeds may be
    repeats of one program.
    """
    values = np.array([[0.1, 0.7, 0.4]] * 3) + np.array([[0], [0], [0.3]])
    assert p_values(values) == {"1": 1.0, "2": None}
    bits = lambda extra: [statistics.mean(x + extra + np.arange(60) % 7) for x in (0.1, 0.7, 0.4)]
    found = judged({"a": bits(0.0), "b": bits(0.3)})[0]
    assert (found.p, found.outcome) == (None, "none")
    assert "equal differences over 3 seeds leave nothing to test" in found.sentence


def test_a_run_that_diverged_does_not_affect_others() -> None:
    numbers, nothing = planted(0.05), statistics.mean([math.nan] * 60)
    wanted = judged(numbers)
    found = judged(numbers | {"lost": [numbers["first"][0], nothing, nothing]})
    assert [v.outcome for v in found] == ["same", "worse", "diverged"]
    assert found[1].difference == wanted[1].difference
    assert found[1].p is not None
    assert wanted[1].p is not None
    assert found[1].p == pytest.approx(1.5 * wanted[1].p), "it was named, and counts"
    assert found[2].sentence == "bits: lost diverged; no verdict on lost and first."
    json.dumps([v._asdict() for v in found], allow_nan=False)
    first = judged({"first": [nothing] * 3} | {x: numbers[x] for x in ("twin", "third")})
    assert [v.outcome for v in first] == ["diverged"] * 2
    assert "first diverged" in first[0].sentence


def test_one_unit_is_not_evidence() -> None:
    numbers = planted(0.05, docs=1)
    third = judged(numbers)[1]
    assert third.p is not None
    assert third.p < 0.05
    assert (third.low, third.high, third.outcome) == (None, None, "same")
    assert third.sentence.endswith("; one unit has no interval.")
    json.dumps(third._asdict(), allow_nan=False)


def test_all_others_have_differences_and_no_verdict() -> None:
    rows = rows_of(planted(0.05))
    found = verdict.rest(rows, [Primary(task="bits", pattern="first", against="third")])
    assert [(v.pattern, v.outcome, v.p) for v in found] == [("twin", "", None)]
    assert found[0].seeds_low is not None
    assert found[0].low is not None
    assert found[0].seeds_low < 0 < (found[0].seeds_high or 0)


BITS = Primary(task="bits", pattern="a", against="b")


@pytest.mark.parametrize(
    ("primary", "message"),
    [
        ([BITS] * 6, "names 6 comparisons; name at most 5"),
        ([dataclasses.replace(BITS, task="bit")], r"primary\[0\]\.task='bit' .* mean 'bits'"),
        ([dataclasses.replace(BITS, against="c")], r"primary\[0\]\.against='c' is not in the"),
        ([dataclasses.replace(BITS, against="a")], "compares 'a' with itself"),
        ([BITS, dataclasses.replace(BITS, pattern="b", against="a")], "at 'bits' twice"),
    ],
)
def test_mistakes_in_one_line(primary: list[Primary], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verdict.check(primary, ("a", "b"), ("bits",))
    verdict.check([BITS], ("a", "b"), ("bits",))


def test_recheck_says_what_stands() -> None:
    rows = rows_of(planted(0.05))
    primary = [Primary(task="bits", pattern=x, against="first") for x in ("twin", "third")]
    page = Comparison(
        question="?",
        seeds=(0, 1, 2),
        tokens=1,
        rows=tuple(rows),
        primary=tuple(dataclasses.asdict(x) for x in primary),
        verdicts=tuple(verdict.judge(rows, primary, (0, 1, 2))),
        differences=(),
        speed_ups=(),
        recall=(),
        recall_asked="",
        facts={},
    )
    lines, all_stand = verdict.recheck(page)
    assert all_stand
    assert [line.partition(":")[0] for line in lines] == ["stands", "stands"]
    wrong = page.verdicts[0]._replace(outcome="better", sentence="twin is better.")
    lines, all_stand = verdict.recheck(
        dataclasses.replace(page, verdicts=(wrong, *page.verdicts[1:]))
    )
    assert not all_stand
    assert lines[0].startswith("does not stand: bits: twin (")
    assert lines[0].endswith("It was: twin is better.")
    with pytest.raises(UserError, match="names no primary comparison"):
        verdict.recheck(dataclasses.replace(page, primary=()))


PAGES = sorted(ROOT.glob("experiments/*/compare.json"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_committed_verdicts_stand(path: Path) -> None:
    page = compared.load(path)
    if page.primary:
        lines, all_stand = verdict.recheck(page)
        assert all_stand, lines
    else:
        assert not page.verdicts


def test_there_are_committed_pages() -> None:
    assert len(PAGES) >= 3
