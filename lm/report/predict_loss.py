"""Predicted losses of schedules, as a table and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import EngFormatter

from lm.report import figures, legends, page

FROM = 0.15  # share of the tokens not drawn: losses there are so high that the rest looks flat


class Line(NamedTuple):
    """`x` tokens and `y` nats per token [n]. A predicted line has a band, `low` and `high`; a line
    without a band was measured.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def table(found: Mapping[str, Any]) -> str:
    """A result of espalier predict_loss as Markdown; schedules from the lowest loss up."""
    law = found["law"]
    names = ("L0", "A", "alpha", "C")
    constants = ", ".join(f"{name} = {law[name]:.4g}" for name in names)
    lines = [
        f"Annealing law of {' and '.join(found['runs'])} ({found['key']}): {constants}, momentum "
        f"{law['decay']:g} (held); residuals {found['residual']:.4f} nats (median of absolutes)",
        "",
        "| schedule | steps | predicted, nats a token | 95 % band | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["schedules"]:
        measured, error = "", ""
        if row["measured"] is not None:
            measured = f"{row['measured']:.4f}"
            error = f"{row['loss'] - row['measured']:+.4f}"
        band = f"{row['low']:.4f} to {row['high']:.4f}"
        cells = (row["schedule"], f"{row['steps']:,}", f"{row['loss']:.4f}", band, measured, error)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(lines: Sequence[Line], *, is_wide: bool = True) -> str:
    """An SVG element: measured losses as points, predicted ones as lines with their bands."""
    with figures.canvas("Predicted loss", is_wide) as (axes, finish):
        seen = []
        for i, line in enumerate(lines):
            ink: Any = {"color": figures.PALETTE[i % len(figures.PALETTE)]}
            shown = line.x >= FROM * line.x[-1]
            x, y = line.x[shown], line.y[shown]
            seen.append(y)
            if line.low is None or line.high is None:
                axes.plot(x, y, ".", markersize=3, label=line.label, **ink)
                continue
            axes.plot(x, y, label=line.label, **ink)
            axes.fill_between(x, line.low[shown], line.high[shown], alpha=0.2, lw=0, **ink)
        values = np.concatenate(seen)
        margin = 0.05 * float(np.ptp(values))
        axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
        axes.set_xlabel("tokens")
        axes.set_ylabel("nats a token")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        legends.below(finish.figure, legends.named(axes))
        return finish()


def document(found: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """A page: the figure, the schedules from the lowest loss up, and the law."""
    drawn = page.drawing(figure(lines), figure(lines, is_wide=False))
    head = ("schedule", "steps", "predicted", "low", "high", "measured")
    rows = [
        [row["schedule"], f"{row['steps']:,}"]
        + ["" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "low", "high")]
        + ["" if row["measured"] is None else f"{row['measured']:.4f}"]
        for row in found["schedules"]
    ]
    message = (
        f"Fitted to {' and '.join(found['runs'])}, {found['key']}. A band holds 95 % of what "
        "resampled fits and their residuals give; what the law itself gets wrong is not in it."
    )
    body = f'<header><h1>Predicted loss</h1><div class="soft">{page.text(message)}</div></header>\n'
    body += page.section("Along the run", f'<div class="figures">{drawn}</div>')
    body += page.section("Schedules, nats a token", page.table(rows, head))
    law = [[name, f"{value:.4g}"] for name, value in found["law"].items()]
    body += page.section("The law", page.table(law, ("constant", "value")))
    return page.document("Predicted loss", body, "Espalier predicted loss")


def plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of lm/studies/predict_loss.py for JSON, from the lowest loss up."""
    return [dataclasses.asdict(row) for row in sorted(rows, key=lambda row: row.loss)]
