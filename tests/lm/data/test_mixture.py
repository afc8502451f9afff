from __future__ import annotations

import numpy as np
import pytest

from lm.data.mixture import PERIOD, Mixture


@pytest.mark.parametrize(
    "shares",
    [[1.0], [0.7, 0.3], [0.7, 0.2, 0.1], [1.005, 1.0], [5, 3, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]],
)
def test_every_prefix_holds_the_shares(shares: list[float]) -> None:
    mixture = Mixture(shares)
    picks = [mixture[i] for i in range(20_000)]
    labels = np.array([label for label, _ in picks])
    counts = np.cumsum(labels[:, None] == np.arange(len(shares)), axis=0)
    rounded = mixture.counts / mixture.counts.sum()
    np.testing.assert_allclose(rounded, np.array(shares) / np.sum(shares), atol=1 / PERIOD)
    exact = np.arange(1, 20_001)[:, None] * rounded
    assert np.abs(counts - exact).max() <= 1 + len(shares) / 6
    for label in range(len(shares)):  # each source is read in order, without a gap
        assert [row for which, row in picks if which == label] == list(range(counts[-1, label]))


def test_start_of_a_stream() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    assert "".join("abc"[mixture[i][0]] for i in range(20)) == "aabaacabaaaabaacabaa"


def test_a_tiny_weight_is_not_lost() -> None:
    counts = Mixture([1.0, 1e-6]).counts
    assert counts.tolist() == [PERIOD, 1]
