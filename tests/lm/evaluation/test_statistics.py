"""Intervals against closed forms, scipy and repeated sampling."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from lm.evaluation import statistics
from lm.evaluation.statistics import Number


def test_wilson_intervals_equal_scipy() -> None:
    for k, n in ((0, 20), (3, 20), (20, 20), (511, 1000)):
        hits = np.arange(n) < k
        found = statistics.share(hits)
        wanted = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert found.value == k / n
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
        assert found.low <= found.value <= found.high


def test_at_chance() -> None:
    coin = statistics.share(np.arange(100) % 2, chance=0.5)
    assert coin.is_at_chance
    assert not statistics.share(np.ones(100), chance=0.5).is_at_chance
    assert statistics.share(np.zeros(100), chance=0.5).is_at_chance, (
        "worse than chance is at chance too"
    )
    assert not statistics.share(np.ones(3)).is_at_chance, "there is no chance level"
    assert statistics.share([1, 1, 1], chance=0.5).is_at_chance, "three items prove nothing"


def test_ratio_is_of_sums() -> None:
    found = statistics.ratio([1.0, 9.0], [1.0, 3.0])
    assert found.value == 10 / 4
    assert found.num == 2
    assert found.low < 1.0 < 3.0 < found.high, "two units say little"
    assert statistics.ratio([1.0, 5.0], [1.0, 0.0]).num == 1, "a unit of weight 0 does not count"


def test_interval_covers_as_often_as_it_says() -> None:
    """95 % of the intervals from 300 samples of 40 clusters of uniform sizes hold the
    true ratio.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        sizes = rng.integers(1, 50, 40)
        means = rng.normal(2.0, 0.3, 40)
        found = statistics.ratio(means * sizes, sizes)
        covered += found.low <= 2.0 <= found.high
    assert 0.89 < covered / 300 < 0.985


@pytest.mark.parametrize("num", [2, 5, 9])
def test_few_units_cover_as_often(num: int) -> None:
    """The units have nearly equal sizes. Bootstrap quantiles of five units would cover 83 %."""
    rng = np.random.default_rng(num)
    covered = paired = 0
    for _ in range(1000):
        sizes = rng.integers(40, 60, num)
        ours, theirs = rng.normal(2.0, 0.3, (2, num))
        first, second = (
            statistics.ratio(x * sizes, sizes, keep_units=True) for x in (ours, theirs)
        )
        covered += first.low <= 2.0 <= first.high
        found = statistics.difference(first, second)
        paired += found.low <= 0 <= found.high
    for count in (covered, paired):
        assert 0.93 < count / 1000 < 0.97


@pytest.mark.parametrize("num", [2, 3, 9, 29, 100])
@pytest.mark.parametrize(
    ("spread", "power", "tail", "least", "most"),
    [
        (1.0, 1.0, False, 0.93, 0.99),  # sizes differ twentyfold or more, noise grows with size
        (1.0, 0.5, False, 0.93, 0.995),  # the variance of the noise grows with size
        (1.5, 1.0, False, 0.93, 0.99),  # sizes differ a hundredfold
        (1.0, 1.0, True, 0.89, 0.95),  # errors with the tail of an exponential
    ],
)
def test_units_of_unequal_size_cover_as_often(
    num: int, spread: float, power: float, tail: bool, least: float, most: float
) -> None:
    """Bootstrap quantiles would cover 77 to 92 %, and BCa intervals 70 to 92 %."""
    rng = np.random.default_rng(num)
    covered = 0
    for _ in range(1000):
        sizes = np.exp(spread * rng.standard_normal(num))
        errors = rng.exponential(size=num) - 1 if tail else rng.standard_normal(num)
        found = statistics.ratio(2 * sizes + 0.3 * errors * sizes**power, sizes)
        covered += found.low <= 2.0 <= found.high
    assert least <= covered / 1000 <= most, covered


def test_one_large_unit_leaves_few_degrees_of_freedom() -> None:
    """Nine books of one size have 8 degrees of freedom, and 2.1 if one book holds half the text."""
    assert statistics._left_out(np.ones(9), np.ones(9))[1] == pytest.approx(8)
    sizes = np.array([8.0, *np.ones(8)])
    assert statistics._left_out(sizes, sizes)[1] == pytest.approx(2.1, abs=0.2)


def test_the_interval_of_few_units_is_that_of_a_t_test() -> None:
    values = np.random.default_rng(0).normal(size=7)
    found = statistics.mean(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_one_unit_has_no_interval() -> None:
    one = statistics.ratio([3.0], [2.0], chance=1.0, keep_units=True)
    assert one.value == 1.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert one.is_at_chance, "one unit shows nothing"
    assert one.interval(".2f") == "one unit: no interval"
    assert statistics.mean([1.0, 1.0]).interval(".2f") == "1.00 to 1.00"
    mapping = one.to_mapping()
    assert (mapping["low"], mapping["high"], mapping["at_chance"]) == (None, None, True)
    assert math.isnan(statistics.difference(one, one).low)


def test_the_interval_of_a_share_is_open_where_units_agree() -> None:
    """Ten rows have eight answers each, all right. The sampled units are the rows."""
    found = statistics.share_of_several(np.full(10, 8.0), np.full(10, 8.0), chance=0.1)
    wanted = statistics.share(np.ones(10))
    assert (found.low, found.high) == (wanted.low, wanted.high)
    mixed = statistics.share_of_several([8.0, 8.0, 0.0], [8.0, 8.0, 8.0])
    assert (mixed.low, mixed.high) == (0.0, 1.0)
    assert statistics.share_of_several(np.full(2, 8.0), np.full(2, 8.0), chance=0.4).is_at_chance


def test_the_units_are_clusters_and_not_tokens() -> None:
    """Ten documents of a thousand equal tokens are ten units."""
    means = np.linspace(1, 3, 10)
    clustered = statistics.ratio(means * 1000, np.full(10, 1000.0))
    tokens = statistics.mean(np.repeat(means, 1000))
    assert clustered.value == pytest.approx(tokens.value)
    assert clustered.high - clustered.low > 10 * (tokens.high - tokens.low)


def test_a_paired_difference_sees_what_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 10, 50)
    ours = statistics.ratio(hard, np.ones(50), keep_units=True)
    theirs = statistics.ratio(hard + 0.1 + 0.01 * rng.normal(size=50), np.ones(50), keep_units=True)
    assert ours.high > theirs.low, "the intervals overlap"
    found = statistics.difference(ours, theirs)
    assert found.high < 0
    assert not found.low < -0.15
    again = statistics.difference(ours, ours)
    assert (again.value, again.low, again.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="not of one sample"):
        statistics.difference(ours, statistics.ratio(hard, hard))


def test_a_number_survives_its_mapping() -> None:
    number = statistics.ratio([1.0, 2.0], [1.0, 1.5], chance=3.0, keep_units=True)
    mapping = json.loads(json.dumps(number.to_mapping(with_units=True), allow_nan=False))
    assert Number.from_mapping(mapping) == number
    assert mapping["at_chance"] is True
    np.testing.assert_array_equal(Number.from_mapping(mapping).units, number.units)  # pyright: ignore[reportArgumentType]
    assert "units" not in number.to_mapping()
    empty = statistics.ratio([], [])
    assert math.isnan(Number.from_mapping(empty.to_mapping()).value)
    json.dumps(empty.to_mapping(), allow_nan=False)


def test_a_model_that_is_not_finite_is_nan() -> None:
    found = statistics.ratio([math.nan, 1.0], [1.0, 1.0])
    assert math.isnan(found.value)
    json.dumps(found.to_mapping(), allow_nan=False)
    kept = statistics.ratio([math.nan, math.inf], [1.0, 1.0], keep_units=True)
    json.dumps(kept.to_mapping(with_units=True), allow_nan=False)
    assert statistics.ratio([math.inf, 1.0], [1.0, 1.0]).to_mapping()["value"] is None
