"""Speed-ups of planted curves whose factor is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from lm.report.compared import Curve, Row
from lm.studies import speedup
from tests.lm.studies import rows

TOKENS = np.linspace(1e4, 1e6, 60)


def row(name: str, curves: list[np.ndarray], flops: float = 1.0, rate: float = 1.0) -> Row:
    curve = Curve(tuple(TOKENS), tuple(tuple(x) for x in curves))
    return rows.row(name, curve=curve, flops_per_token=flops, tokens_per_second=rate)


def law(factor: float, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """The curve of a pattern that learns `factor` times as fast."""
    return 1.5 + 30 * (factor * TOKENS) ** -0.4 + noise


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.25, 3.0])
def test_a_planted_factor(factor: float) -> None:
    base, ours = row("base", [law(1.0)]), row("ours", [law(factor)], flops=2.0, rate=0.5)
    found = speedup.speed_ups([base, ours])[0]
    # Straight lines between the points of a convex curve lie above it, least near their ends.
    assert found.tokens == (pytest.approx(factor, rel=2.5e-2), None, None)
    assert found.flops[0] == pytest.approx(found.tokens[0] / 2, rel=1e-3)
    assert found.seconds[0] == pytest.approx(found.tokens[0] / 2, rel=1e-3)


def test_seeds_give_an_interval_that_covers() -> None:
    """Noise of a batch is shared by both patterns, and each has some of its own.

    Of the intervals of four seeds, 95 % should hold the planted factor; with what smoothing leaves,
    92 % do.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        shared = rng.normal(0, 0.01, (4, 60))
        base = row("base", [law(1.0, noise) for noise in shared])
        own = rng.normal(0, 0.005, (4, 60))
        ours = row("ours", [law(1.4, noise) for noise in shared + own])
        low, high = speedup.speed_ups([base, ours])[0].tokens[1:]
        assert low is not None
        assert high is not None
        hits += low <= 1.4 <= high
    assert hits > 88, hits


def test_equal_curves_are_exactly_one_and_noise_does_not_lengthen_them() -> None:
    noisy = law(1.0, np.random.default_rng(0).normal(0, 0.02, 60))
    found = speedup.speed_ups([row("a", [noisy, law(1)]), row("b", [noisy, law(1)])])[0]
    assert found.tokens == (1.0, 1.0, 1.0)


def test_what_has_no_curve_has_no_speed_up() -> None:
    base, lost = row("base", [law(1.0)]), row("lost", [np.full(60, math.nan)])
    variant = dataclasses.replace(base, pattern="variant", curve=None)
    assert speedup.speed_ups([base, lost, variant]) == []
    assert speedup.speed_ups([variant, base]) == []


def test_a_pattern_that_never_learns_has_no_factor() -> None:
    """The first pattern is below that pattern's last loss from its first point on."""
    assert speedup.speed_ups([row("base", [law(1.0)]), row("flat", [np.full(60, 9.0)])]) == []
