"""Sizes of models that are compared: patterns of mixers made equally large by the width of the
feed-forward or the depth; and one configuration at other widths and depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lm import pattern as pattern_lib
from lm.config import Config, from_mapping
from lm.mapping import UserError, to_mapping

TOLERANCE, GRAIN = 0.01, 8  # share of the parameters; step of the feed-forward width
GROWING = ("num_heads", "num_kv_heads", "ffn_dim")  # sizes that are proportional to the width


class Size(NamedTuple):
    """The width or depth that makes a pattern as large as the first."""

    ffn_dim: int
    num_layers: int


def equal(
    patterns: Sequence[str], given: Size, count: Callable[[str, Size], int]
) -> dict[str, Size]:
    """The size of every pattern: its feed-forward width, from the straight line through two widths;
    or its depth, if no layer has a feed-forward. `given` is the first pattern's size; `count`
    returns the number of parameters.

    Raises:
      UserError: a pattern with the smallest width has more parameters than the first.
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
    """The depth nearest to `target` parameters; it can only be exact to half a layer."""
    period = len(pattern.split(","))
    one, two = (count(pattern, given._replace(num_layers=n * period)) for n in (1, 2))
    periods = max(1, round(1 + (target - one) / (two - one)))
    return given._replace(num_layers=periods * period)


def widened(config: Config, width: int) -> Config:
    """`config` at another model width. Heads keep their width, so there are proportionally more of
    them, and the feed-forward grows too; the same holds for these sizes in the options of layers.

    Raises:
      UserError: at that width a number of heads or the feed-forward width is not an integer.
    """
    values: Any = to_mapping(config)

    def scaled(node: Mapping[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.items():
            if isinstance(value, Mapping):
                found[key] = scaled(value, f"{where}.{key}")
            elif key in GROWING:
                found[key] = _times(value, width, config.model.width, f"{where}.{key}")
            else:
                found[key] = value
        return found

    return from_mapping({**values, "model": {**scaled(values["model"], "model"), "width": width}})


def _times(size: int, width: int, base: int, where: str) -> int:
    if size * width % base:
        raise UserError(
            f"{where}={size} at model.width={base} is not whole at width {width}; "
            "name a width at which it is"
        )
    return size * width // base


def deepened(config: Config, num_layers: int) -> Config:
    """`config` with another number of layers; its pattern is cycled over the depth.

    Raises:
      UserError: a pattern of groups, whose depth is fixed.
    """
    values: Any = to_mapping(config)
    if pattern_lib.depth(config.model.pattern, num_layers) != num_layers:
        raise UserError(
            f"model.pattern={config.model.pattern} is of groups, which have a fixed depth; name "
            "labels, which are cycled over the depth"
        )
    return from_mapping({**values, "model": {**values["model"], "num_layers": num_layers}})
