"""Verdicts against scipy's tests, planted differences and planted chance."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from lm.evaluation import statistics
from lm.evaluation.statistics import Number
from lm.studies import verdict


def planted(
    gap: float, seeds: int = 3, noise: float = 0.003, docs: int = 60
) -> dict[str, list[Number]]:
    """Bits per byte of three patterns over the same documents; the third is `gap` above the
    first. Seeds and documents shift all alike.
    """
    rng = np.random.default_rng(0)
    base, sizes = rng.normal(2.0, 0.3, docs), rng.integers(100, 1000, docs).astype(float)
    shift = rng.normal(0, 0.1, seeds)
    found: dict[str, list[Number]] = {}
    for pattern, extra in (("first", 0.0), ("twin", 0.0), ("third", gap)):
        row = []
        for s in range(seeds):
            bits = base + shift[s] + extra + rng.normal(0, noise) + rng.normal(0, noise, docs)
            row.append(statistics.ratio(bits * sizes, sizes, keep_units=True))
        found[pattern] = row
    return found


def judged(numbers: dict[str, list[Number]], is_better: str = "lower") -> list[verdict.Verdict]:
    return verdict.judge("bits", numbers, is_better=is_better, unit="bits per byte")


def p_values(values: np.ndarray) -> dict[str, float | None]:
    """values [P, S]; patterns are named by their row."""
    return verdict.seed_p_values({str(i): row for i, row in enumerate(values)})


def test_a_planted_difference_is_found_and_a_twin_is_not() -> None:
    twin, third = judged(planted(0.05))
    assert (twin.outcome, third.outcome) == ("same", "worse")
    assert third.difference == pytest.approx(0.05, abs=0.01)
    assert third.p is not None
    assert third.low is not None
    assert third.p < 0.05 < (twin.p or 0)
    assert third.low > 0
    assert "third (" in third.sentence
    assert "is worse than first" in third.sentence
    assert [v.outcome for v in judged(planted(0.05), "higher")] == ["same", "better"]


def test_one_seed_gives_no_verdict() -> None:
    """However clear the documents are: another seed might turn it."""
    found = judged(planted(0.5, seeds=1))
    assert [v.outcome for v in found] == ["same", "same"]
    assert found[1].p is None
    assert "one seed says nothing of others" in found[1].sentence


def test_documents_can_withhold_it() -> None:
    """All of the difference lies in one document of thirty: seeds agree, documents do not."""
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
    even = [statistics.share(coin, chance=0.5)] * 2
    found = judged({"a": even, "b": even}, "higher")
    assert found[0].outcome == "none"
    assert "at chance; no verdict" in found[0].sentence
    sure = [statistics.share(np.ones(400), chance=0.5), statistics.share(coin + 1 > 1, chance=0.5)]
    assert judged({"a": even, "b": sure}, "higher")[0].outcome != "none"


def test_a_task_where_all_are_at_chance_is_one_sentence() -> None:
    even = [statistics.share(np.arange(400) % 2, chance=0.5)] * 2
    numbers = {"a": even, "b": even, "c": even}
    clear = judged(planted(0.05))
    found = verdict.shortened([*judged(numbers, "higher"), *(v._replace(task="x") for v in clear)])
    assert [v.outcome for v in found] == ["none", "same", "worse"]
    assert found[0].sentence == "bits: every pattern is at chance; no verdict."


def test_two_patterns_are_a_paired_t_test() -> None:
    """With P = 2 the two-way layout is the paired t-test."""
    values = np.random.default_rng(0).normal(size=(2, 6)) + np.array([[0.0], [0.8]])
    found = p_values(values)
    assert found["1"] == pytest.approx(stats.ttest_rel(values[1], values[0]).pvalue)


def test_false_alarms_are_as_rare_as_they_say() -> None:
    """Six equal patterns, two seeds, 400 studies: at most 5 % have any corrected p below 0.05."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        values = rng.normal(size=(6, 2)) + rng.normal(0, 10, (1, 2))
        alarms += min(p or 1.0 for p in p_values(values).values()) < 0.05
    assert alarms / 400 < 0.07


def test_variants_are_no_trained_patterns() -> None:
    """Three equal patterns, two seeds, and four readings of the first's runs, 1,000 studies: as
    rows of the layout they would make a false alarm of every fifth.
    """
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        trained = rng.normal(size=(3, 2))
        copies = trained[0] + rng.normal(0, 0.01, (4, 2))
        values = dict(zip("abcdefg", [*trained, *copies], strict=True))
        found = verdict.seed_p_values(values, "defg")
        assert list(found) == list("bcdefg")
        alarms += min(p or 1.0 for p in found.values()) < 0.05
    assert alarms / 1000 < 0.07


def test_a_variant_is_compared_by_pairs() -> None:
    values = dict(zip("abc", np.random.default_rng(0).normal(size=(3, 6)), strict=True))
    found = verdict.seed_p_values(values, "c")
    paired = [stats.ttest_rel(values[x], values["a"]).pvalue for x in "bc"]
    assert [found[x] for x in "bc"] == pytest.approx(verdict.holm(np.array(paired)).tolist())


def test_equal_numbers_are_no_difference() -> None:
    assert p_values(np.ones((3, 2))) == {"1": 1.0, "2": 1.0}
    assert p_values(np.ones((1, 3))) == {}


def test_equal_differences_give_no_p() -> None:
    """Nothing is left to chance, which is no proof: of two runs of one program, say."""
    values = np.array([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]]) + np.array([[0], [0], [0.3]])
    assert p_values(values) == {"1": 1.0, "2": None}
    bits = lambda extra: [statistics.mean(x + extra + np.arange(60) % 7) for x in (0.1, 0.7)]
    found = judged({"a": bits(0.0), "b": bits(0.3)})[0]
    assert (found.p, found.outcome) == (None, "same")
    assert "equal differences over 2 seeds give no p" in found.sentence


def test_a_run_that_diverged_takes_no_other_with_it() -> None:
    numbers, nothing = planted(0.05), statistics.mean([math.nan] * 60)
    wanted = judged(numbers)
    found = judged(numbers | {"lost": [numbers["first"][0], nothing, nothing]})
    assert [v.outcome for v in found] == ["same", "worse", "diverged"]
    assert found[1].difference == wanted[1].difference
    assert found[1].p == wanted[1].p, "it has no part in the layout, nor in Holm's correction"
    assert found[2].sentence == "bits: lost diverged; no verdict on lost against first."
    json.dumps([v._asdict() for v in found], allow_nan=False)
    first = judged({"first": [nothing] * 3} | {x: numbers[x] for x in ("twin", "third")})
    assert [v.outcome for v in first] == ["diverged"] * 2
    assert "first diverged" in first[0].sentence


def test_one_unit_is_no_evidence() -> None:
    numbers = planted(0.05, docs=1)
    third = judged(numbers)[1]
    assert third.p is not None
    assert third.p < 0.05
    assert (third.low, third.high, third.outcome) == (None, None, "same")
    assert third.sentence.endswith("over 3 seeds, 1 unit: no interval.")
    json.dumps(third._asdict(), allow_nan=False)
