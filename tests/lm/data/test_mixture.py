from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from lm.data.mixture import Mixture

RARE = 1e-6
SHARES: dict[str, list[float]] = {
    "one": [1.0],
    "two": [0.7, 0.3],
    "near": [1.005, 1.0],
    "five": [5, 3, 1, 1, 0.25],
    "alike": [1.0] * 37,
    "few_large": [0.85] + [0.0025] * 60,
    "halves": [2.0**-i for i in range(24)],
    "steep": [1.0, 1e-2, 1e-4, RARE, RARE, 1e-9],
    "random": list(np.random.default_rng(3).lognormal(0.0, 3.0, 150)),
    "many": [1.0] + [1e-3] * 400,
}


@pytest.mark.parametrize("name", SHARES)
def test_every_prefix_is_less_than_two_rows_off(name: str) -> None:
    """The docstring proves this bound. Each source is read in order, without a gap."""
    shares, rows = SHARES[name], 6000
    mixture, total = Mixture(shares), sum(map(Fraction, shares))
    labels, numbers = np.array([mixture[i] for i in range(rows)]).T
    for label, share in enumerate(shares):
        places = np.flatnonzero(labels == label)
        assert numbers[places].tolist() == list(range(len(places)))
        wanted = np.arange(rows + 1) * float(Fraction(share) / total)
        found = np.concatenate([[0], np.cumsum(labels == label)])
        assert np.abs(found - wanted).max() < 2


def test_a_small_share_is_kept_far_out() -> None:
    """A share of 1e-6 gets its rows in the first three million, and a trillion rows later."""
    mixture, whole = Mixture([1.0, RARE]), Fraction(1.0) + Fraction(RARE)
    period = whole / Fraction(RARE)
    places = [int(period * (m + Fraction(1, 2))) for m in (0, 1, 2, 10**6)]
    for m, place in zip((0, 1, 2, 10**6), places, strict=True):
        near = [mixture[i] for i in range(place - 3, place + 4)]
        assert [number for label, number in near if label == 1] == [m]
    assert mixture[10**18][0] in (0, 1)


def test_rows_of_rare_sources_are_never_adjacent() -> None:
    """There are thirty sources of a thousandth each; no two of their rows are neighbors."""
    mixture = Mixture([0.97] + [0.001] * 30)
    rare = np.flatnonzero([mixture[i][0] > 0 for i in range(4000)])
    assert np.diff(rare).min() >= 33
    assert np.diff(rare).max() <= 34


def test_start_of_a_stream() -> None:
    """These values are frozen: another order needs another version."""
    mixture = Mixture([0.7, 0.2, 0.1])
    assert "".join("abc"[mixture[i][0]] for i in range(20)) == "abaacaaabaabaacaaaba"
