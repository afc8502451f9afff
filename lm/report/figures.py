"""The curves of a report, as SVG that takes its colors from the page: light or dark.

Training curves show each record faintly and a running mean over a fiftieth of the records. With
several runs the color tells the run and dashes the curve; with one, the color tells the curve.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
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

from lm.laws import critical_batch
from lm.laws.critical_batch import THETA
from lm.report.folder import Run

# Colors that stand out on white and on black (after Okabe and Ito).
PALETTE = ("#2f7ed8", "#e07b27", "#2a9d76", "#b05cc6", "#d1495b", "#8a8f98", "#b59b1d", "#3aa6c2")
# Stand-ins that become style variables of the page.
INK, GRID = "#010203", "#010204"
MAX_POINTS = 1000
DASHES = ("-", "--", ":", "-.")
# Figures whose axis starts at zero, with the format of its numbers.
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
}


class Picture(NamedTuple):
    """`svg` is an element to put into the page."""

    title: str
    note: str
    svg: str
    is_wide: bool


class Curve(NamedTuple):
    """What one figure shows of a run: keys of records with their labels."""

    title: str
    note: str
    keys: Callable[[Run], dict[str, str]]
    log: bool = False
    is_wide: bool = False
    smooth: bool = True
    series: Callable[[Run, str], tuple[np.ndarray, np.ndarray]] = Run.series


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
    """A ratio of the log from the running means of what it divides."""
    below = {"noise/scale": "noise/grad_sq", "noise/norm_test": "optim/grad_norm"}[key]
    at, trace = run.series("noise/trace")
    norms = run.series("noise/trace", over=below)[0]
    if key == "noise/norm_test":
        norms = THETA**2 * np.square(norms)
    return at, critical_batch.smoothed(trace, norms, max(3, len(at) / 50))


CURVES = (
    Curve("Bits per byte", "", _losses("bpb", "train/bpb"), log=True, is_wide=True),
    Curve("Loss", "nats per token", _losses("loss", "train/loss"), log=True),
    Curve("Learning rate", "per parameter group", _by_role("lr"), smooth=False),
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
    """The figures for which there are data."""
    return [
        Picture(curve.title, curve.note, _draw(curve, runs), curve.is_wide)
        for curve in CURVES
        if any(curve.keys(run) for run in runs)
    ]


def _draw(curve: Curve, runs: Sequence[Run]) -> str:
    with canvas(curve.title, curve.is_wide) as (axes, finish):
        labels = list(dict.fromkeys(label for run in runs for label in curve.keys(run).values()))
        for i, run in enumerate(runs):
            for key, label in curve.keys(run).items():
                j = labels.index(label)
                dashes = DASHES[j % len(DASHES)] if len(runs) > 1 else "-"
                color = PALETTE[(i if len(runs) > 1 else j) % len(PALETTE)]
                _line(
                    axes,
                    curve.series(run, key),
                    curve.smooth,
                    {"color": color, "linestyle": dashes},
                )
            if curve.title == "Gradient norm":
                _skipped(axes, run, PALETTE[i % len(PALETTE)] if len(runs) > 1 else PALETTE[4])
        _axes(axes, curve)
        if handles := _legend(curve, runs, labels):
            axes.legend(handles=handles, loc="best", handlelength=1.6)
        return finish()


@contextlib.contextmanager
def canvas(title: str, is_wide: bool) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on in the style of the report, and what gives the finished SVG element; to be
    called inside.
    """
    style: Any = {**STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 3.4) if is_wide else (4.7, 2.7), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)

        def finish() -> str:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            return element(buffer.getvalue(), title)

        yield axes, finish


def standalone(svg: str) -> str:
    """An SVG element of a page as a file of its own: ink on white, size given."""
    view = svg.split('viewBox="')[1].split('"')[0]
    width, height = view.split()[2:]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    ground = f'><rect width="{width}" height="{height}" fill="#ffffff"/>'
    text = svg.replace("<svg ", head, 1).replace(">", ground, 1)
    text = text.replace("var(--ink)", "#1d2430").replace("var(--line)", "#e3e7ed")
    return text.replace("</svg>", "</svg>\n").strip() + "\n"


def _line(
    axes: Axes, series: tuple[np.ndarray, np.ndarray], smooth: bool, ink: dict[str, Any]
) -> None:
    x, y = series
    if len(x) < 30:  # evaluations, or a run that has just begun
        axes.plot(x, y, marker="o", markersize=4.5, zorder=3, linewidth=1.2, **ink)
        return
    x, y = _thin(x), _thin(y)
    if smooth:
        axes.plot(x, y, color=ink["color"], linewidth=0.8, alpha=0.25)
        y = _running_mean(y, max(3, len(y) // 50))
    axes.plot(x, y, **ink)


def _legend(curve: Curve, runs: Sequence[Run], labels: list[str]) -> list[Line2D]:
    """With one run: color and label. With several: runs by color, labels by dashes; where both
    would crowd a small figure, the runs' colors are those of the other figures."""
    if len(runs) == 1:
        pairs = zip(PALETTE, labels, strict=False)
        return [Line2D([], [], color=c, label=label) for c, label in pairs if label]
    handles = []
    if curve.is_wide or len(labels) == 1:
        pairs = zip(runs, PALETTE, strict=False)
        handles = [Line2D([], [], color=color, label=run.name) for run, color in pairs]
    if len(labels) > 1:
        for label, dashes in zip(labels, DASHES, strict=False):
            handles.append(Line2D([], [], color=INK, linestyle=dashes, label=label))
    return handles


def _skipped(axes: Axes, run: Run, color: str) -> None:
    at = {record["step"]: record for record in run.records}
    records = [at[step] for step, _ in run.skipped()]
    x = np.array([record["tokens"] for record in records])
    y = np.array([record.get("optim/grad_norm", np.nan) for record in records])
    is_shown = np.isfinite(y)
    axes.plot(x[is_shown], y[is_shown], "x", color=color)
    edge = np.full(np.sum(~is_shown), 0.97)  # no line: its height is not in units of the axis
    axes.scatter(x[~is_shown], edge, marker="x", color=color, transform=axes.get_xaxis_transform())


def _axes(axes: Axes, curve: Curve) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    shown = [v for line in axes.lines for v in np.asarray(line.get_ydata(), dtype=float)]
    finite = [v for v in shown if np.isfinite(v)]
    positive = [v for v in finite if v > 0]  # a first step of learning rate 0 updates nothing
    if curve.log and positive and min(positive) < 0.99 * max(positive):
        axes.set_yscale("log", nonpositive="mask")
        if max(positive) < 30 * min(positive):  # under two decades, plain numbers read better
            axes.yaxis.set_major_locator(AutoLocator())
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
    elif finite and max(finite) > 0 and curve.title in FROM_ZERO:
        axes.set_ylim(bottom=0)
        if FROM_ZERO[curve.title] is not None:
            axes.yaxis.set_major_formatter(FROM_ZERO[curve.title])


def _thin(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS means of neighbors, of those that are finite; NaN where none is."""
    if len(values) <= MAX_POINTS:
        return values
    parts = (part[np.isfinite(part)] for part in np.array_split(values, MAX_POINTS))
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Interquartile mean of the finite values around each; NaN where there is none."""
    half = window // 2
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        near = np.sort(near[np.isfinite(near)])
        quarter = len(near) // 4
        means.append(near[quarter : len(near) - quarter].mean() if len(near) else np.nan)
    return np.array(means)


def element(svg: str, title: str) -> str:
    """A matplotlib document as an element that scales and takes the page's colors and fonts."""
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    view = head[head.index('viewBox="') :].split('"')[1]
    name = title.replace("&", "and")
    start = f'<svg viewBox="{view}" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    return f'{start} aria-label="{name}">{rest}'.replace(INK, "var(--ink)").replace(
        GRID, "var(--line)"
    )
