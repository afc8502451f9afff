"""Legends outside the axes, where they cover no curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LETTERS = 12  # characters of a label per inch
LINE = 6  # width, in characters, of the line before a label plus the space between columns
ROW = 0.19  # inches


def below(figure: Figure, handles: Mapping[str, Any], title: str = "") -> None:
    """Puts a legend below all axes of a figure with constrained layout. `handles` maps labels to
    what they explain. The legend has as many columns as fit, and the figure grows by its height. A
    label longer than the figure is wide loses its middle.
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
    """The `handles` for `below`: the curves of all panels by label, each label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: x for x, label in zip(handles, labels, strict=True) if label}
    return found


def _letters(labels: Sequence[str], columns: int) -> int:
    """The width of a legend in characters; it is filled column by column."""
    parts = np.array_split([len(label) for label in labels], columns)
    return sum(LINE + int(part.max()) for part in parts)


def shortened(label: str, letters: int) -> str:
    """A label in at most `letters` characters: its beginning and its end.

    >>> shortened("gated_deltanet", 9)
    'gate…anet'
    """
    if len(label) <= letters:
        return label
    half = (letters - 1) // 2
    return f"{label[:half]}…{label[-half:]}"
