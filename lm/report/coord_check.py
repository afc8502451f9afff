"""A coordinate check (lm/studies/coord_check.py) as a table, a verdict and figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lm.config import convert
from lm.report import legends, log_axes
from lm.report.figures import PALETTE, STYLE, element, svg

FLAT, POWER = 0.1, 0.3  # the guide's largest slope that passes; the slope that shows power
# By what the slopes are taken over: parametrizations that must be flat, and one that must fail.
JUDGED = {"width": ("mup", "completep"), "layers": ("completep",)}
CONTROL = {"width": "standard", "layers": "mup"}
PROBES = ("embedding", "mixer", "mlp", "stream", "logits")
LATE = ("logits",)  # probes judged in the second half of the steps


@dataclasses.dataclass(frozen=True)
class Curve:
    """One training. `probes`: mean |activation| before the first step and after every step. `over`:
    width or layers, whichever its slopes are taken against. `digest`: of everything but the seed.
    """

    pattern: str
    parametrization: str
    width: int
    layers: int
    optimizer: str
    seed: int
    digest: str
    over: str
    probes: Mapping[str, tuple[float, ...]]

    @property
    def size(self) -> int:
        return self.layers if self.over == "layers" else self.width


def judged(probe: str, steps: int) -> range:
    """The steps, from 0 to `steps`, at which a probe is judged."""
    return range(-(-steps // 2) if probe in LATE else 0, steps + 1)


class Verdict(NamedTuple):
    """The verdict on one pattern, parametrization and optimizer. `slopes`: probe -> slope at every
    step. `worst`: probe and step of the steepest slope that is judged. `sizes`: the trained sizes.
    """

    pattern: str
    parametrization: str
    optimizer: str
    over: str
    slopes: dict[str, np.ndarray]
    worst: tuple[str, int]
    sizes: tuple[int, ...]

    @property
    def steepest(self) -> float:
        probe, step = self.worst
        return float(self.slopes[probe][step])

    @property
    def is_judged(self) -> bool:
        return self.parametrization in JUDGED[self.over]

    @property
    def holds(self) -> bool:
        """Whether slopes are flat where they must be, and steep where the check must have power."""
        if self.is_judged:
            return abs(self.steepest) <= FLAT
        return abs(self.steepest) > POWER

    @property
    def message(self) -> str:
        if self.is_judged:
            return "flat" if self.holds else "not flat"
        return "fails, as it should" if self.holds else "does not fail: no power"


def curves_of(values: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Curves from JSON.

    Raises:
      UserError: the values are not such curves.
    """
    return [convert(Curve, row, f"coord_check[{i}]") for i, row in enumerate(values)]


def verdicts(curves: Sequence[Curve]) -> list[Verdict]:
    """Verdicts in the order of the curves. An unfinished check with one size has no slopes."""
    groups: dict[tuple[str, str, str, str], list[Curve]] = {}
    for curve in curves:
        key = curve.pattern, curve.parametrization, curve.optimizer, curve.over
        groups.setdefault(key, []).append(curve)
    found = []
    for key, own in groups.items():
        if len({curve.size for curve in own}) < 2:
            continue
        slopes = {probe: _slopes(own, probe) for probe in PROBES if probe in own[0].probes}
        places = [(probe, steepest(probe, slopes[probe])) for probe in slopes]
        worst = max(places, key=lambda place: _steepness(slopes[place[0]][place[1]]))
        found.append(Verdict(*key, slopes, worst, tuple(sorted({curve.size for curve in own}))))
    return found


def steepest(probe: str, slopes: np.ndarray) -> int:
    """The step with the steepest slope among those that are judged."""
    return max(judged(probe, len(slopes) - 1), key=lambda step: _steepness(slopes[step]))


def _steepness(slope: float) -> float:
    """What is not finite counts as steepest, so it cannot pass."""
    return abs(slope) if math.isfinite(slope) else math.inf


def means(curves: Sequence[Curve], probe: str) -> tuple[np.ndarray, np.ndarray]:
    """sizes [N]; and the mean over seeds of log |activation| [N, steps + 1], NaN if one is 0."""
    sizes = sorted({curve.size for curve in curves})
    logs = []
    for size in sizes:
        own = np.asarray([curve.probes[probe] for curve in curves if curve.size == size])
        logs.append(np.mean(np.log(np.where(own > 0, own, np.nan)), axis=0))
    return np.asarray(sizes), np.asarray(logs)


def _slopes(curves: Sequence[Curve], probe: str) -> np.ndarray:
    """The least-squares slope of log |activation| against log size, at every step."""
    sizes, logs = means(curves, probe)
    x = np.log(sizes) - np.mean(np.log(sizes))
    return x @ logs / (x @ x)


HEAD = ("mixers", "optimizer", "parametrization", "over", *PROBES, "")


def table(curves: Sequence[Curve]) -> str:
    """For every probe the steepest slope among the steps at which it is judged, as Markdown."""
    lines = [f"| {' | '.join(HEAD[:-1])} | |", "|" + "---|" * len(HEAD)]
    for verdict in verdicts(curves):
        cells = [verdict.pattern, verdict.optimizer, verdict.parametrization]
        cells.append(f"{verdict.over} {', '.join(map(str, verdict.sizes))}")
        for probe in PROBES:
            if probe not in verdict.slopes:
                cells.append("")
                continue
            slopes = verdict.slopes[probe]
            step = steepest(probe, slopes)
            cells.append(f"{slopes[step]:+.3f} (step {step})")
        lines.append(f"| {' | '.join(cells)} | {verdict.message} |")
    return "\n".join(lines) + "\n"


def slopes_figure(curves: Sequence[Curve]) -> str:
    """An SVG element: slope over steps, one panel per probe, one line per verdict. Slopes in the
    band pass.
    """
    found = verdicts(curves)
    style: Any = {**STYLE, "svg.hashsalt": "slopes"}
    with mpl.rc_context(style):
        drawn, grid = _panels(1, len(PROBES))
        for axes, probe in zip(grid.flat, PROBES, strict=True):
            axes.axhspan(-FLAT, FLAT, color=PALETTE[2], alpha=0.15, linewidth=0)
            for i, verdict in enumerate(found):
                if probe in verdict.slopes:
                    ink: Any = _ink(found, i)
                    slopes = verdict.slopes[probe]
                    axes.plot(
                        np.arange(len(slopes)), slopes, linewidth=1.2, label=_name(found, i), **ink
                    )
            axes.set_title(probe, fontsize=9)
            axes.set_xlabel("step")
        grid.flat[0].set_ylabel(f"slope over {curves[0].over}")
        handles = {}
        for axes in grid.flat:
            handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        legends.below(drawn, handles)
        return element(svg(drawn), "Slopes of activations")


def curves_figure(curves: Sequence[Curve]) -> str:
    """An SVG element for the first pattern and optimizer: |activation| over width for every step,
    one row per parametrization, one panel per probe.
    """
    first = [
        c for c in curves if (c.pattern, c.optimizer) == (curves[0].pattern, curves[0].optimizer)
    ]
    rows = list(dict.fromkeys(curve.parametrization for curve in first))
    colors = mpl.colormaps["viridis"]
    style: Any = {**STYLE, "svg.hashsalt": "curves"}
    with mpl.rc_context(style):
        drawn, grid = _panels(len(rows), len(PROBES), sharey="col")
        handles = {}
        for axes_row, parametrization in zip(grid, rows, strict=True):
            own = [curve for curve in first if curve.parametrization == parametrization]
            for axes, probe in zip(axes_row, PROBES, strict=True):
                if probe in own[0].probes:
                    handles |= _curves(axes, *means(own, probe), colors)
                axes.set_title(probe, fontsize=9)
                axes.set_xlabel(own[0].over)
            axes_row[0].set_ylabel(f"{own[0].pattern}, {parametrization}\nmean |activation|")
        for column in grid.T:
            log_axes.scale(column[0], "y", log_axes.heights(*column))
        legends.below(drawn, handles)
        return element(svg(drawn), "Activations")


def _curves(axes: Axes, sizes: np.ndarray, logs: np.ndarray, colors: Any) -> dict[str, Any]:
    last = logs.shape[1] - 1
    lines = {}
    for step in range(last + 1):
        color = colors(0.9 * step / max(last, 1))
        (line,) = axes.plot(sizes, np.exp(logs[:, step]), marker="o", markersize=3, color=color)
        lines[f"step {step}"] = line
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    return lines


def _panels(down: int, across: int, **shared: Any) -> tuple[Figure, Any]:
    drawn = Figure(figsize=(2.1 * across, 2.2 * down + 0.4), layout="constrained")
    return drawn, drawn.subplots(down, across, squeeze=False, **shared)


def _ink(found: Sequence[Verdict], i: int) -> dict[str, Any]:
    """One color per pattern and optimizer; dashed if the slope need not be flat."""
    names = list(dict.fromkeys((v.pattern, v.optimizer) for v in found))
    place = names.index((found[i].pattern, found[i].optimizer))
    dashes = ("-", ":")[place // len(PALETTE) % 2] if found[i].is_judged else "--"
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": dashes}


def _name(found: Sequence[Verdict], i: int) -> str:
    parts = [found[i].pattern]
    if len({v.optimizer for v in found}) > 1:
        parts.append(found[i].optimizer)
    if len({v.parametrization for v in found}) > 1:
        parts.append(found[i].parametrization)
    return ", ".join(parts)
