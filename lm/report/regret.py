"""Regret of an untuned schedule: a table, and a figure of what tuning saw and what it gained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm.report import legends
from lm.report.figures import INK, PALETTE, STYLE, element, svg
from lm.report.page import amount

Values = Sequence[Mapping[str, Any]]  # lm.studies.regret.plain
HEAD = ("width", "tokens a step", "tokens", "tuned rate", "regret, nats a token")


def table(found: Values) -> str:
    """A Markdown table for each family."""
    parts = []
    for one in found:
        lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        for x in one["budgets"]:
            rate = f"{x['tuned_rate']:.4g}" + (" (edge of its grid)" if x["is_edge"] else "")
            cells = (x["width"], f"{x['batch_tokens']:,}", f"{x['tokens']:,}", rate, _shown(x))
            lines.append(f"| {' | '.join(map(str, cells))} |")
        title = f"**Against {one['family']}, tuned at every budget: {_shown(one['overall'])}**"
        parts.append(f"{title} over {len(one['seeds'])} seeds\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _shown(x: Mapping[str, float]) -> str:
    return f"{x['mean']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})"


def figure(found: Values, untuned: str) -> str:
    """An SVG element. One panel per budget shows loss against peak rate on the seeds used for
    tuning, with the untuned schedule as a level line. The last panel shows the regret on the other
    seeds.
    """
    titles = _titles(found[0]["budgets"])
    style: Any = {**STYLE, "svg.hashsalt": "regret"}
    with mpl.rc_context(style):
        size = (2.5 * (len(titles) + 1) + 0.3, 2.7)
        drawn = Figure(figsize=size, layout="constrained")
        *panels, last = drawn.subplots(1, len(titles) + 1, squeeze=False)[0]
        for i, axes in enumerate(panels):
            _curves(axes, [(one["family"], one["budgets"][i]) for one in found], untuned)
            axes.set_title(titles[i], fontsize=9)
        panels[0].set_ylabel("loss, nats a token")
        _regrets(last, found)
        last.set_xticks(range(len(titles)), titles, rotation=20, fontsize=8)
        legends.below(drawn, legends.named(panels[0]))
        return element(svg(drawn), f"Loss of {untuned} and of schedules tuned at every budget")


def _curves(axes: Axes, shown: Sequence[tuple[str, Mapping[str, Any]]], untuned: str) -> None:
    for ink, (family, budget) in zip(itertools.cycle(PALETTE), shown, strict=False):
        points = [(rate, loss) for rate, loss in budget["losses"] if loss is not None]
        label = f"{family}, its rate tuned"
        axes.plot(*zip(*points, strict=True), "o-", color=ink, markersize=3, label=label)
    budget = shown[0][1]
    if budget["own_loss"] is not None:
        axes.axhline(budget["own_loss"], color=INK, linestyle="--", label=f"{untuned}, one setting")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("peak learning rate")


def _regrets(axes: Axes, found: Values) -> None:
    for i, (ink, one) in enumerate(zip(itertools.cycle(PALETTE), found, strict=False)):
        at = [place + 0.12 * (i - (len(found) - 1) / 2) for place in range(len(one["budgets"]))]
        means = [x["mean"] for x in one["budgets"]]
        ends = [[x["mean"] - x["low"] for x in one["budgets"]]]
        ends.append([x["high"] - x["mean"] for x in one["budgets"]])
        axes.errorbar(at, means, yerr=ends, fmt="o", color=ink, markersize=4, capsize=2)
    axes.axhline(0.0, color=INK, linestyle="--")
    axes.set_title("regret against the tuned rate", fontsize=9)
    axes.set_ylabel("nats a token, 95 %")


def _titles(budgets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Budgets named by their tokens, and by whatever else differs between them."""
    forms = {
        "tokens": lambda x: f"{amount(x)} tokens",
        "batch_tokens": lambda x: f"{x:,} a step",
        "width": lambda x: f"width {x}",
    }
    differing = [key for key in forms if key == "tokens" or len({x[key] for x in budgets}) > 1]
    return [", ".join(forms[key](budget[key]) for key in differing) for budget in budgets]
