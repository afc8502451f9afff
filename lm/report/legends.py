"""Legends outside the axes, so that they cover no curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LETTERS = 12  # of a label, an inch
LINE = 6  # letters that the line in front of a label takes, with the space between columns
ROW = 0.19  # inches


def below(figure: Figure, handles: Mapping[str, Any], title: str = "") -> None:
    """A legend below all axes of a figure with constrained layout: label -> what it explains. It
    has as many columns as fit. The figure grows by the height of the legend. A label that is
    longer than the figure is wide loses its middle.
    """
    if not handles:
        return
    letters = int(LETTERS * figure.get_figwidth()) + 2  # the last column needs no space after it
    labels = [shortened(label, letters - LINE) for label in handles]
    fitting = (n for n in range(len(labels), 1, -1) if _letters(labels, n) <= letters)
    columns = next(fitting, 1)
    rows = -(-len(labels) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + ROW * rows)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "columnspacing": 1.4}
    figure.legend(list(handles.values()), labels, title=title or None, handlelength=1.6, **place)


def named(*panels: Axes) -> dict[str, Any]:
    """What `below` takes: the curves of all panels by label, those of one label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: x for x, label in zip(handles, labels, strict=True) if label}
    return found


def _letters(labels: Sequence[str], columns: int) -> int:
    """How wide a legend is; it is filled column by column."""
    parts = np.array_split([len(label) for label in labels], columns)
    return sum(LINE + int(part.max()) for part in parts)


def shortened(label: str, letters: int) -> str:
    """At most so many letters of a label: its beginning and its end.

    >>> shortened("gated_deltanet", 9)
    'gate…anet'
    """
    if len(label) <= letters:
        return label
    half = (letters - 1) // 2
    return f"{label[:half]}…{label[-half:]}"
