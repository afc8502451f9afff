"""Loss against learning rate at several widths and parametrizations: a figure and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm.report import legends
from lm.report.figures import PALETTE, STYLE, element, svg

HEAD = ("mixers", "parametrization", "best rate by width", "bins moved", "cost, nats", "")


class Shown(Protocol):
    """A lm.studies.lr_transfer.Transfer."""

    @property
    def pattern(self) -> str: ...
    @property
    def parametrization(self) -> str: ...
    @property
    def losses(self) -> Mapping[int, Mapping[float, float]]: ...
    @property
    def best(self) -> Mapping[int, float]: ...
    @property
    def shift(self) -> int: ...
    @property
    def cost(self) -> float: ...
    @property
    def edges(self) -> list[int]: ...
    @property
    def is_as_expected(self) -> bool: ...


def of_plain(values: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What `table` shows, from a result file. A cost of None was not finite."""
    cost = lambda x: math.inf if x["cost"] is None else x["cost"]
    return [SimpleNamespace(**{**one, "cost": cost(one)}) for one in values]


def table(found: Sequence[Shown]) -> str:
    """The results as a Markdown table."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for one in found:
        best = ", ".join(f"{width}: {rate:.3g}" for width, rate in one.best.items())
        message = "as expected" if one.is_as_expected else "**not as expected**"
        if one.edges:
            message += f"; at the edge of the grid at {', '.join(map(str, one.edges))}"
        cells = (
            one.pattern,
            one.parametrization,
            best,
            f"{one.shift:+d}",
            f"{one.cost:.3f}",
            message,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(found: Sequence[Shown]) -> str:
    """An SVG element: one row of panels per parametrization, one column per pattern."""
    patterns = list(dict.fromkeys(one.pattern for one in found))
    names = list(dict.fromkeys(one.parametrization for one in found))
    style: Any = {**STYLE, "svg.hashsalt": "lr_transfer"}
    with mpl.rc_context(style):
        size = (2.6 * len(patterns) + 0.4, 2.4 * len(names) + 0.2)
        drawn = Figure(figsize=size, layout="constrained")
        grid = drawn.subplots(len(names), len(patterns), squeeze=False, sharey="col")
        for axes in grid.flat:
            axes.set_visible(False)
        for one in found:
            axes = grid[names.index(one.parametrization)][patterns.index(one.pattern)]
            axes.set_visible(True)
            _panel(axes, one)
        legends.below(drawn, legends.named(next(a for a in grid.flat if a.get_visible())))
        return element(svg(drawn), "Loss against learning rate by width")


def _panel(axes: Axes, one: Shown) -> None:
    for i, (width, curve) in enumerate(one.losses.items()):
        finite = {rate: loss for rate, loss in curve.items() if math.isfinite(loss)}
        ink = PALETTE[i % len(PALETTE)]
        label = f"width {width}"
        axes.plot(list(finite), list(finite.values()), "o-", color=ink, markersize=3, label=label)
        if (best := one.best[width]) in finite:
            axes.plot([best], [finite[best]], "o", color=ink, markersize=8, fillstyle="none")
    axes.set_xscale("log", base=2)
    axes.set_title(f"{one.pattern}, {one.parametrization}", fontsize=8)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss, nats a token")
