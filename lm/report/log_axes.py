"""Logarithmic axes with plain numbers that do not touch.

Matplotlib labels every multiple of a power of ten, as 3 × 10⁻², if the axis spans little more than
one decade. In a narrow panel such labels lie on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    EngFormatter,
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

FEW = 3.0  # below this ratio of the ends, ticks lie at equal distances in value
# Below these ratios they lie at these multiples of powers of ten, and above at the powers only.
MULTIPLES = ((30.0, (1.0, 2.0, 3.0, 5.0)), (100.0, (1.0, 2.0, 5.0)))


def scale(axes: Axes, which: Literal["x", "y"], values: Sequence[float] | np.ndarray) -> None:
    """Makes an axis logarithmic and puts its ticks. `values`: what the axis shows."""
    shown = [float(x) for x in values if math.isfinite(x) and x > 0]
    ratio = max(shown) / min(shown) if shown else 1.0
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    subs = next((subs for most, subs in MULTIPLES if ratio < most), (1.0,))
    axis.set_major_locator(MaxNLocator(5) if ratio < FEW else LogLocator(subs=subs))
    axis.set_major_formatter(_formatter(shown))
    axis.set_minor_locator(NullLocator() if len(subs) > 1 else LogLocator(subs=range(2, 10)))
    axis.set_minor_formatter(NullFormatter())


def heights(*panels: Axes) -> list[float]:
    """The y values of all lines."""
    lines = (line for axes in panels for line in axes.lines)
    return [float(y) for line in lines for y in np.asarray(line.get_ydata(), dtype=float)]


def _formatter(shown: Sequence[float]) -> Formatter:
    """200k for large numbers, 0.002 for small ones."""
    if max(shown, default=1.0) >= 1e4:
        return EngFormatter(sep="")
    return FuncFormatter(lambda value, _: f"{value:g}")
