"""What makes patterns of mixers equally large: the width of the feed-forward, or the depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lm.mapping import UserError

TOLERANCE, GRAIN = 0.01, 8  # of the parameters; of the feed-forward width


class Size(NamedTuple):
    """What makes a pattern as large as the first: the solved width or depth."""

    ffn_dim: int
    num_layers: int


def equal(
    patterns: Sequence[str], given: Size, count: Callable[[str, Size], int]
) -> dict[str, Size]:
    """The size of every pattern: its feed-forward width by the straight line through two, or, where
    no layer has one, its depth. `given` is the first pattern's; `count` gives the parameters.

    Raises:
      UserError: a pattern that has more parameters than the first at the least width.
    """
    first = patterns[0]
    target, sizes = count(first, given), {first: given}
    for pattern in patterns[1:]:
        small, large = (count(pattern, given._replace(ffn_dim=n * GRAIN)) for n in (1, 2))
        slope = (large - small) / GRAIN
        if not slope:
            sizes[pattern] = _equal_depth(pattern, given, target, count)
            continue
        wanted = GRAIN + (target - small) / slope
        width = max(GRAIN, GRAIN * round(wanted / GRAIN))
        found = small + slope * (width - GRAIN)
        if abs(found - target) > TOLERANCE * target:
            raise UserError(
                f"pattern {pattern!r} has {found:,.0f} parameters at ffn_dim={width}, "
                f"{first!r} has {target:,}; set a larger run.model.ffn_dim"
            )
        sizes[pattern] = given._replace(ffn_dim=width)
    return sizes


def _equal_depth(pattern: str, given: Size, target: int, count: Callable[[str, Size], int]) -> Size:
    """The depth nearest to `target` parameters: half a layer is the best there is."""
    period = len(pattern.split(","))
    one, two = (count(pattern, given._replace(num_layers=n * period)) for n in (1, 2))
    periods = max(1, round(1 + (target - one) / (two - one)))
    return given._replace(num_layers=periods * period)
