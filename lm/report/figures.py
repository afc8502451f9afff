"""The curves of a report, as SVG that takes its colors from the page, light or dark.

Training curves show each record faintly, with a running mean over a fiftieth of the records on top.
With several runs it is over a twenty-fifth, because close lines are legible only if they are
smooth. With several runs, color tells runs apart and dashes tell curves apart; with one run, color
tells the curves apart, and dashes let an equal curve below show through. A bar at the upper edge
spans records of a curve that are not finite; every such curve has its own height.
"""

from __future__ import annotations

import colorsys
import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    AutoLocator,
    EngFormatter,
    NullLocator,
    PercentFormatter,
    ScalarFormatter,
)

from lm import files
from lm.laws import critical_batch
from lm.laws.critical_batch import THETA
from lm.report import groups, legends, log_axes
from lm.report.folder import Run

# Colors visible on white and on black (after Okabe and Ito).
PALETTE = ("#2f7ed8", "#e07b27", "#2a9d76", "#b05cc6", "#d1495b", "#8a8f98", "#b59b1d", "#3aa6c2")
# Placeholders that become style variables of the page.
INK, GRID = "#010203", "#010204"
MAX_POINTS = 1000  # per curve; fewer if there are several runs
DASHES = ("-", "--", ":", "-.")
# On top of a curve that is equal to the first, second, ... all of them stay visible.
SHARED = ("-", (0, (12, 6)), (0, (6, 12)))
# Figures whose axis starts at zero, with the number format of the axis.
FROM_ZERO = {
    "Learning rate": None,
    "Throughput": EngFormatter(sep=""),
    "MFU": PercentFormatter(xmax=1.0),
}
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.major.size": 0,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


class Picture(NamedTuple):
    """`svg` is an element to put into the page. `narrow` is the same for a phone, "" if `svg` is
    narrow enough. `file` is an element that stands alone: its legend names the runs.
    """

    title: str
    note: str
    svg: str
    narrow: str
    file: str

    @property
    def name(self) -> str:
        return self.title.lower().replace(" ", "_")


class Curve(NamedTuple):
    """What one figure shows of a run: keys of records, and their labels. `caption`: the note where
    it depends on the runs.
    """

    title: str
    note: str
    keys: Callable[[Run], dict[str, str]]
    log: bool = False
    is_wide: bool = False
    smooth: bool = True
    series: Callable[[Run, str], tuple[np.ndarray, np.ndarray]] = Run.series
    caption: Callable[[Sequence[Run]], str] | None = None


def _only(key: str) -> Callable[[Run], dict[str, str]]:
    return lambda run: {key: ""} if run.keys(key + "*") else {}


def _by_role(prefix: str) -> Callable[[Run], dict[str, str]]:
    return lambda run: {key: key.split("/")[1] for key in run.keys(f"{prefix}/*")}


def _losses(unit: str, train: str) -> Callable[[Run], dict[str, str]]:
    def keys(run: Run) -> dict[str, str]:
        evals = {key: f"validation {key.split('/')[1]}" for key in run.keys(f"eval/*/{unit}")}
        return ({train: "training"} if run.keys(train + "*") else {}) | evals

    return keys


def _noise(run: Run) -> dict[str, str]:
    labels = {"noise/scale": "noise scale", "noise/norm_test": "norm test"}
    return labels if run.keys("noise/trace*") else {}


def _ratio(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """A ratio in the log, recomputed from the running means of its two parts."""
    below = {"noise/scale": "noise/grad_sq", "noise/norm_test": "optim/grad_norm"}[key]
    at, trace = run.series("noise/trace")
    norms = run.series("noise/trace", over=below)[0]
    if key == "noise/norm_test":
        norms = THETA**2 * np.square(norms)
    return at, critical_batch.smoothed(trace, norms, max(3, len(at) / 50))


CURVES = (
    Curve("Bits per byte", "", _losses("bpb", "train/bpb"), log=True, is_wide=True),
    Curve("Loss", "nats per token", _losses("loss", "train/loss"), log=True),
    Curve("Learning rate", "", _by_role("lr"), smooth=False, caption=groups.caption),
    Curve(
        "Gradient norm",
        "before clipping; × marks skipped steps, at the upper edge where the norm is not finite",
        _only("optim/grad_norm"),
        log=True,
    ),
    Curve("Update norm", "per parameter group", _by_role("update_norm"), log=True),
    Curve("Parameter norm", "per parameter group", _by_role("param_norm"), smooth=False),
    Curve("Learning rate multiplier", "of the hypergradient", _only("optim/hypergradient")),
    Curve(
        "Gradient noise",
        f"tokens a batch; of running means; norm test with theta {THETA}",
        _noise,
        log=True,
        smooth=False,
        series=_ratio,
    ),
    Curve("Throughput", "tokens per second, evaluation left out", _only("time/tokens_per_second")),
    Curve("MFU", "share of the devices' peak FLOP/s", _only("time/mfu")),
)


def draw(runs: Sequence[Run]) -> list[Picture]:
    """The figures that have data."""
    return [_picture(curve, runs) for curve in CURVES if any(curve.keys(run) for run in runs)]


def colors(count: int) -> list[str]:
    """A color for each of `count` runs. If the palette is too small, all colors differ by hue."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    found = (colorsys.hls_to_rgb(i / count, 0.45 + 0.1 * (i % 2), 0.65) for i in range(count))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in found]


def save(page: Path, pictures: Mapping[str, str]) -> Path:
    """Writes SVG elements as files into a folder beside their page: "run.html" has "run_figures".
    `pictures` maps file names to elements. Returns the folder.
    """
    folder = page.with_name(f"{page.stem}_figures")
    folder.mkdir(exist_ok=True)
    for name, svg in pictures.items():
        files.replace(folder / f"{name}.svg", standalone(svg))
    return folder


def _picture(curve: Curve, runs: Sequence[Run]) -> Picture:
    drawn = _draw(curve, runs, is_wide=curve.is_wide)
    narrow = _draw(curve, runs, is_wide=False) if curve.is_wide else ""
    is_named = len(runs) == 1  # with several runs, the page names them once above all figures
    file = drawn if is_named else _draw(curve, runs, is_wide=curve.is_wide, names_runs=True)
    note = curve.caption(runs) if curve.caption else curve.note
    lines = [curve.series(run, key) for run in runs for key in curve.keys(run)]
    if curve.title != "Gradient norm" and any(_gaps(x, y) for x, y in lines):
        note += ("; " if note else "") + "bars at the upper edge: not finite"
    return Picture(curve.title, note, drawn, narrow, file)


def _draw(
    curve: Curve, runs: Sequence[Run], *, is_wide: bool = False, names_runs: bool = False
) -> str:
    with canvas(curve.title, is_wide) as (axes, finish):
        labels = list(dict.fromkeys(label for run in runs for label in curve.keys(run).values()))
        inks = colors(len(runs))
        drawn: list[tuple[tuple[np.ndarray, np.ndarray], str]] = []
        for i, run in enumerate(runs):
            for key, label in curve.keys(run).items():
                j = labels.index(label)
                series = curve.series(run, key)
                equal = sum(np.array_equal(series[1], other[1]) for other, _ in drawn)
                dashes = DASHES[j % len(DASHES)] if len(runs) > 1 else SHARED[equal % len(SHARED)]
                color = inks[i] if len(runs) > 1 else PALETTE[j % len(PALETTE)]
                ink = {"color": color, "linestyle": dashes}
                _line(axes, series, curve.smooth, ink, len(runs))
                drawn.append((series, color))
            if curve.title == "Gradient norm":
                _skipped(axes, run, inks[i] if len(runs) > 1 else PALETTE[4])
        _axes(axes, curve, max((run.last("tokens") or 0.0 for run in runs), default=0.0))
        if curve.title != "Gradient norm":
            _bars(axes, [(gaps, color) for s, color in drawn if (gaps := _gaps(*s))])
        legends.below(finish.figure, _legend(runs, labels, names_runs))
        return finish()


class Finish(NamedTuple):
    """Inside `canvas`, call this to get the finished SVG element of the figure."""

    figure: Figure
    title: str

    def __call__(self) -> str:
        return element(svg(self.figure), self.title)


@contextlib.contextmanager
def canvas(title: str, is_wide: bool) -> Iterator[tuple[Axes, Finish]]:
    """Axes to draw on in the style of the report, and a function for the finished SVG element."""
    style: Any = {**STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 3.4) if is_wide else (4.7, 2.7), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        yield axes, Finish(figure, title)


def svg(figure: Figure) -> str:
    """A figure as an SVG document; the same figure gives the same bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def standalone(svg: str) -> str:
    """An SVG element of a page as a file of its own: black on white, with its size."""
    view = svg.split('viewBox="')[1].split('"')[0]
    width, height = view.split()[2:]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    ground = f'><rect width="{width}" height="{height}" fill="#ffffff"/>'
    text = svg.replace("<svg ", head, 1).replace(">", ground, 1)
    text = text.replace("var(--ink)", "#1d2430").replace("var(--line)", "#e3e7ed")
    return text.replace("</svg>", "</svg>\n").strip() + "\n"


def _line(
    axes: Axes,
    series: tuple[np.ndarray, np.ndarray],
    smooth: bool,
    ink: dict[str, Any],
    num_runs: int,
) -> None:
    x, y = series
    if len(x) < 30:  # evaluations, or a run that has only just begun
        axes.plot(x, y, marker="o", markersize=4.5, zorder=3, linewidth=1.2, **ink)
        return
    points = MAX_POINTS if num_runs == 1 else MAX_POINTS * 2 // 5
    x, y = _thin(x, points), _thin(y, points)
    if smooth:
        width, alpha = (0.8, 0.25) if num_runs == 1 else (0.5, max(0.12, 0.25 / num_runs))
        axes.plot(x, y, color=ink["color"], zorder=1, linewidth=width, alpha=alpha)
        y = _running_mean(y, max(3, len(y) // (50 if num_runs == 1 else 25)))
    axes.plot(x, y, **ink)


def _legend(runs: Sequence[Run], labels: list[str], names_runs: bool) -> dict[str, Line2D]:
    """With one run: color and label. With several runs: labels by dashes, and the runs by color if
    this figure names them.
    """
    if len(runs) == 1:
        pairs = zip(PALETTE, labels, strict=False)
        return {label: Line2D([], [], color=color) for color, label in pairs if label}
    handles = {}
    if names_runs:
        pairs = zip(runs, colors(len(runs)), strict=True)
        handles = {run.name: Line2D([], [], color=color) for run, color in pairs}
    if len(labels) > 1:
        for i, label in enumerate(labels):
            handles[label] = Line2D([], [], color=INK, linestyle=DASHES[i % len(DASHES)])
    return handles


def _gaps(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """The first and last `x` of every span of records whose `y` is not finite."""
    is_lost = np.concatenate([[False], ~np.isfinite(y), [False]])
    starts, ends = (np.flatnonzero(np.diff(is_lost.astype(int)) == sign) for sign in (1, -1))
    return [(float(x[i]), float(x[j - 1])) for i, j in zip(starts, ends, strict=True)]


def _bars(axes: Axes, lost: Sequence[tuple[list[tuple[float, float]], str]]) -> None:
    """Bars at the upper edge, one height for each curve; many curves share a quarter of it."""
    step = min(0.03, 0.25 / max(1, len(lost)))
    for i, (gaps, color) in enumerate(lost):
        ink: Any = {"color": color, "linewidth": 4 * step / 0.03}
        for gap in gaps:
            at = [0.98 - i * step] * 2
            axes.plot(gap, at, transform=axes.get_xaxis_transform(), **ink)


def _skipped(axes: Axes, run: Run, color: str) -> None:
    at = {record["step"]: record for record in run.records}
    records = [at[step] for step, _ in run.skipped()]
    x = np.array([record["tokens"] for record in records])
    y = np.array([record.get("optim/grad_norm", np.nan) for record in records])
    is_shown = np.isfinite(y)
    axes.plot(x[is_shown], y[is_shown], "x", color=color)
    edge = np.full(np.sum(~is_shown), 0.97)  # a height in axes coordinates, not in data units
    axes.scatter(x[~is_shown], edge, marker="x", color=color, transform=axes.get_xaxis_transform())


def _axes(axes: Axes, curve: Curve, last: float) -> None:
    """Sets up the axes. `last`: tokens of the longest run; all figures of a page extend to it."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if last > 0:
        axes.set_xlim(-0.01 * last, 1.01 * last)
    finite = [v for v in log_axes.heights(axes) if np.isfinite(v)]
    positive = [v for v in finite if v > 0]  # a first step of learning rate 0 updates nothing
    if curve.log and positive and min(positive) < 0.99 * max(positive):
        axes.set_yscale("log", nonpositive="mask")
        if max(positive) < 30 * min(positive):  # below two decades plain numbers are easier to read
            axes.yaxis.set_major_locator(AutoLocator())
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
    elif finite and max(finite) > 0 and curve.title in FROM_ZERO:
        axes.set_ylim(bottom=0)
        if FROM_ZERO[curve.title] is not None:
            axes.yaxis.set_major_formatter(FROM_ZERO[curve.title])


def _thin(values: np.ndarray, points: int) -> np.ndarray:
    """At most `points` means of neighboring finite values; NaN where there are none."""
    size = -(-len(values) // points)
    if size <= 1:
        return values
    groups = (values[i : i + size] for i in range(0, len(values), size))
    parts = (group[np.isfinite(group)] for group in groups)
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Interquartile mean of the finite values around each place; NaN if there are none. The first
    windows are shorter but symmetric: the loss falls fast there, and its mean must begin where it
    does.
    """
    means = []
    for i in range(len(values)):
        half = min(i, window // 2)
        near = values[i - half : i + half + 1]
        near = np.sort(near[np.isfinite(near)])
        quarter = len(near) // 4
        means.append(near[quarter : len(near) - quarter].mean() if len(near) else np.nan)
    return np.array(means)


def element(svg: str, title: str) -> str:
    """A matplotlib document as an element that scales, with the colors and fonts of the page."""
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    view = head[head.index('viewBox="') :].split('"')[1]
    name = title.replace("&", "and")
    start = f'<svg viewBox="{view}" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    return f'{start} aria-label="{name}">{rest}'.replace(INK, "var(--ink)").replace(
        GRID, "var(--line)"
    )
