"""The page of a sweep: loss against learning rate, heat maps, and the best rate of every setting.

rows (lm/studies/rows.py) -> panels: rows that differ only in learning rate, tokens and seed
-> one line per number of tokens, the mean over seeds
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm import files
from lm.report import figures, legends, page
from lm.report.figures import STYLE, element, svg
from lm.report.page import amount

Row = Mapping[str, Any]
PER_LINE = 3  # panels in a row; on a phone, one
LETTERS = 40  # of a line of a panel's title
# Columns that vary within a panel; columns that were measured; and columns that follow from others.
WITHIN = ("learning_rate", "tokens", "seed", "steps", "schedule.peak_learning_rate", "run.length")
FOUND = (
    *("cell", "trunk", "loss", "status", "skipped", "seconds", "commit", "cpu"),
    *("parameters", "body_parameters", "data.batch_size"),
)


class Panel(NamedTuple):
    """`title`: what its rows have in common and other rows do not. `losses`: tokens -> learning
    rate -> loss of every seed, inf if it diverged.
    """

    title: str
    losses: dict[int, dict[float, list[float]]]

    def means(self, tokens: int) -> dict[float, float]:
        """Learning rate -> mean loss, by ascending rate."""
        return {rate: float(np.mean(x)) for rate, x in sorted(self.losses[tokens].items())}

    def best(self, tokens: int) -> float | None:
        """The learning rate with the least mean loss; None if all diverged."""
        means = self.means(tokens)
        rate = min(means, key=lambda x: means[x])
        return rate if math.isfinite(means[rate]) else None

    def is_edge(self, tokens: int) -> bool:
        """Whether the best rate is the smallest or largest tried; the optimum may lie beyond it."""
        rates, best = list(self.means(tokens)), self.best(tokens)
        return best is None or best in (rates[0], rates[-1])


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Rows grouped by what they have in common, in the order of the table."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    outer = [x for x in names if x not in WITHIN + FOUND and not x.startswith("loss/")]
    differing = [x for x in outer if len({str(row.get(x)) for row in rows}) > 1]
    found: dict[str, Panel] = {}
    for row in rows:
        own = {name: row.get(name) for name in differing}
        title = ", ".join(f"{name} {x}" for name, x in own.items() if x is not None)
        panel = found.setdefault(title, Panel(title, {}))
        loss = math.inf if row["loss"] is None else row["loss"]
        by_rate = panel.losses.setdefault(row["tokens"], {})
        by_rate.setdefault(row["learning_rate"], []).append(loss)
    return list(found.values())


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes the page, and its figures beside it as SVG files."""
    found = panels(rows)
    shapes = {"loss": _curves, "map": _map}
    pictures = {name: _drawn(found, draw, name) for name, draw in shapes.items()}
    narrow = {name: _drawn(found, draw, name, across=1) for name, draw in shapes.items()}
    drawn = {name: page.drawing(svg, narrow[name]) for name, svg in pictures.items()}
    files.replace(path, _render(rows, found, drawn))
    figures.save(path, pictures)


def _render(rows: Sequence[Row], found: Sequence[Panel], drawn: Mapping[str, str]) -> str:
    seeds = {row["seed"] for row in rows}
    diverged = sum(row["status"] == "diverged" for row in rows)
    cards = [
        page.card("cells", f"{len(rows)}", f"{diverged} diverged"),
        page.card("trainings", f"{len({row['trunk'] for row in rows})}", "trunks and single runs"),
        page.card("seeds", f"{len(seeds)}"),
        page.card("hours", f"{sum(row['seconds'] for row in rows) / 3600:.1f}", "of one process"),
    ]
    notes = '<p class="soft">The mean over the seeds; a band from the least to the largest.</p>'
    maps = '<p class="soft">Loss above the best of the same number of tokens, in nats a token.</p>'
    body = [
        "<header><h1>Sweep</h1></header>\n",
        f'<div class="cards">{"".join(cards)}</div>',
        page.section("Loss against learning rate", notes + _figure(drawn["loss"])),
        page.section("Heat maps", maps + _figure(drawn["map"])),
        page.section("Best learning rate", page.table(_best(found), HEAD)),
    ]
    return page.document("Sweep", "".join(body), "Espalier sweep")


def _figure(drawn: str) -> str:
    return f'<div class="figures">{drawn}</div>'


def table(rows: Sequence[Row]) -> str:
    """The best rate of every setting, as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(str(x) for x in line)} |" for line in _best(panels(rows))]
    return "\n".join(lines) + "\n"


HEAD = ("setting", "tokens", "best rate", "loss", "seeds", "")


def _best(found: Sequence[Panel]) -> list[tuple[object, ...]]:
    lines = []
    for panel in found:
        for tokens in sorted(panel.losses):
            rate = panel.best(tokens)
            message = "at the edge of the grid" if panel.is_edge(tokens) else ""
            if rate is None:
                lines.append((panel.title, amount(tokens), "-", "diverged", 0, message))
                continue
            seeds = len(panel.losses[tokens][rate])
            loss = f"{panel.means(tokens)[rate]:.4f}"
            lines.append((panel.title, amount(tokens), f"{rate:.4g}", loss, seeds, message))
    return lines


def _drawn(found: Sequence[Panel], draw: Any, title: str, across: int = PER_LINE) -> str:
    """An SVG element, `across` panels in a row. Each number of tokens has the same color in all
    panels.
    """
    lengths = sorted({tokens for panel in found for tokens in panel.losses})
    inks = dict(zip(lengths, figures.colors(len(lengths)), strict=True))
    across = min(across, len(found))
    down = -(-len(found) // across)
    titles = [textwrap.fill(panel.title, LETTERS) for panel in found]
    height = 2.7 + 0.13 * max(title.count("\n") for title in titles)
    style: Any = {**STYLE, "svg.hashsalt": "sweep"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.2 * across, height * down + 0.2), layout="constrained")
        figure.patch.set_alpha(0.0)
        grid = figure.subplots(down, across, squeeze=False)
        for axes, panel, name in zip(grid.flat, found, titles, strict=False):
            axes.patch.set_alpha(0.0)
            axes.set_title(name, fontsize=8)
            draw(axes, panel, inks)
        for axes in grid.flat[len(found) :]:
            axes.remove()
        named, order = legends.named(*grid.flat[: len(found)]), map(amount, lengths)
        legends.below(figure, {label: named[label] for label in order if label in named}, "tokens")
        return element(svg(figure), title)


def _curves(axes: Axes, panel: Panel, inks: Mapping[int, str]) -> None:
    for tokens in sorted(panel.losses):
        means = {rate: x for rate, x in panel.means(tokens).items() if math.isfinite(x)}
        if not means:
            continue
        rates = list(means)
        ink = inks[tokens]
        least, most = ([f(panel.losses[tokens][r]) for r in rates] for f in (min, max))
        axes.fill_between(rates, least, most, color=ink, alpha=0.15, linewidth=0)
        axes.plot(rates, list(means.values()), "o-", color=ink, markersize=3, label=amount(tokens))
        if (best := panel.best(tokens)) is not None:
            axes.plot([best], [means[best]], "o", color=ink, markersize=7, fillstyle="none")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss, nats a token")


def _map(axes: Axes, panel: Panel, inks: Mapping[int, str]) -> None:
    del inks
    lengths = sorted(panel.losses)
    rates = sorted({rate for tokens in lengths for rate in panel.losses[tokens]})
    excess = np.full((len(lengths), len(rates)), np.nan)
    for i, tokens in enumerate(lengths):
        means = panel.means(tokens)
        least = min(means.values())
        for j, rate in enumerate(rates):
            if rate in means and math.isfinite(means[rate]):
                excess[i, j] = means[rate] - least
    axes.imshow(np.minimum(excess, 0.5), cmap="Blues", origin="lower", aspect="auto", vmax=0.5)
    for (i, j), value in np.ndenumerate(excess):
        if np.isfinite(value):
            ink = "white" if value > 0.3 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(len(rates)), [f"{rate:.2g}" for rate in rates], fontsize=6, rotation=45)
    axes.set_yticks(range(len(lengths)), [amount(tokens) for tokens in lengths], fontsize=7)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("tokens")
    axes.grid(visible=False)
