"""The result of a search for learning rates: its rates over the steps, with every probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from lm.report import log_axes
from lm.report.figures import PALETTE, canvas

HEAD = ("steps", "rate", "forecast of its probe", "probes", "diverged")


class Shown(Protocol):
    """A lm.studies.autolrs.Stage."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def forecasts(self) -> tuple[Any, ...]: ...
    @property
    def rate(self) -> float: ...


def table(stages: Sequence[Shown]) -> str:
    """A Markdown table; forecasts are changes of the loss over the stage, in nats per token."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for stage in stages:
        known = dict(zip(stage.rates, stage.forecasts, strict=True))
        best = f"{known[stage.rate]:+.3f}" if stage.rate else ""
        lost = sum(x is None for x in stage.forecasts)
        span = f"{stage.start}-{stage.end}"
        lines.append(f"| {span} | {stage.rate:.4g} | {best} | {len(known)} | {lost} |")
    return "\n".join(lines) + "\n"


def plain(stages: Sequence[Shown], loss: float | None) -> dict[str, Any]:
    """Plain values for JSON. `loss`: the loss at the end of the decay, None without a decay."""
    keys = ("start", "end", "rates", "forecasts", "rate")
    return {"searched": [{k: getattr(x, k) for k in keys} for x in stages], "loss": loss}


def summary(values: Mapping[str, Any]) -> str:
    """The values of `plain` as Markdown: the table, and the loss."""
    stages: list[Any] = [SimpleNamespace(**stage) for stage in values["searched"]]
    text = table(stages)
    if values["loss"] is None:
        return text
    return f"{text}\nValidation loss after the decay: {values['loss']:.4f} nats a token.\n"


def figure(stages: Sequence[Shown]) -> str:
    """An SVG element: the rate of every stage as a line, its probes as points."""
    with canvas("Learning rates that were searched", is_wide=True) as (axes, finish):
        for stage in stages:
            span = (stage.start, stage.end)
            middle = sum(span) / 2
            lost = [r for r, x in zip(stage.rates, stage.forecasts, strict=True) if x is None]
            axes.plot([middle] * len(stage.rates), stage.rates, "o", color="#9aa5b4", markersize=3)
            axes.plot([middle] * len(lost), lost, "x", color="#b3261e", markersize=5)
            if stage.rate:
                axes.plot(span, (stage.rate,) * 2, color=PALETTE[0], linewidth=2)
        log_axes.scale(axes, "y", [rate for stage in stages for rate in stage.rates])
        axes.set_xlabel("step")
        axes.set_ylabel("learning rate; points are probes")
        return finish()
