"""Recall against the size of the state: a table and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from lm.config import convert
from lm.report import legends
from lm.report.figures import PALETTE, STYLE, element, svg

PER_LINE = 4  # panels in a row


@dataclasses.dataclass(frozen=True)
class Row:
    """A pattern at a width. Accuracy at the best learning rate, by test setting: mean over seeds,
    and each seed. Steps of each seed. `seconds`: of everything trained for it. `state_bytes`: of
    one row after the longest test setting, all layers. `parameters`: without the embedding.
    """

    problem: str
    pattern: str
    width: int
    learning_rate: float
    accuracy: Mapping[str, float]
    by_seed: Mapping[str, tuple[float, ...]]
    steps: tuple[int, ...]
    num_trained: int
    state_bytes: int
    parameters: int
    seconds: float


def rows_of(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows from JSON.

    Raises:
      UserError: the values are not such rows.
    """
    return [convert(Row, row, f"recall[{i}]") for i, row in enumerate(values)]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, one table per problem, in the order of the study."""
    parts = []
    for problem in dict.fromkeys(row.problem for row in rows):
        chosen = [row for row in rows if row.problem == problem]
        names = list(chosen[0].accuracy)
        titles = ["mixers", "width", "state, bytes a row", *names, "learning rate", "steps"]
        titles += ["parameters", "trained", "seconds"]
        lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
        for row in chosen:
            cells = [row.pattern, row.width, f"{row.state_bytes:,}"]
            cells += [f"{100 * row.accuracy[name]:.1f} %" for name in names]
            cells += [f"{row.learning_rate:g}", f"{np.mean(row.steps):,.0f}"]
            cells += [f"{row.parameters:,}", row.num_trained, f"{row.seconds:,.0f}"]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        parts.append(f"**{problem}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def figure(rows: Sequence[Row], across: int = PER_LINE) -> str:
    """An SVG element: accuracy over bytes of state, one panel per problem and test setting, one
    line per pattern, `across` panels in a row.
    """
    panels = []
    for problem in dict.fromkeys(row.problem for row in rows):
        chosen = [row for row in rows if row.problem == problem]
        panels += [(problem, name, chosen) for name in chosen[0].accuracy]
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    style: Any = {**STYLE, "svg.hashsalt": "recall"}
    with mpl.rc_context(style):
        drawn = Figure(figsize=(3.1 * across, 2.5 * down + 0.2), layout="constrained")
        grid = drawn.subplots(down, across, squeeze=False, sharey=True)
        for axes, (problem, name, chosen) in zip(grid.flat, panels, strict=False):
            _panel(axes, chosen, name, patterns)
            axes.set_title(name if problem == name else f"{problem}: {name}", fontsize=9)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        legends.below(drawn, legends.named(grid.flat[0]))
        return element(svg(drawn), "Recall against state")


def _panel(axes: Axes, rows: Sequence[Row], name: str, patterns: list[str]) -> None:
    markers = "os^Dv<>P"
    for i, pattern in enumerate(patterns):
        own = [row for row in rows if row.pattern == pattern]
        own.sort(key=lambda row: row.state_bytes)
        x, y = [row.state_bytes for row in own], [row.accuracy[name] for row in own]
        # When the palette is used up colors repeat, with other dashes.
        dashes = ("-", "--", ":")[i // len(PALETTE) % 3]
        ink: Any = {"color": PALETTE[i % len(PALETTE)], "linestyle": dashes}
        marker = markers[i % len(markers)]
        axes.plot(x, y, marker=marker, markersize=4, linewidth=1.2, label=pattern, **ink)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_xlabel("state, bytes a row")
    axes.set_ylabel("answers right")
    axes.label_outer(remove_inner_ticks=False)


def _size(num_bytes: float) -> str:
    """65536 -> "64K"."""
    for unit, scale in (("M", 2**20), ("K", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g}{unit}"
    return f"{num_bytes:g}"
