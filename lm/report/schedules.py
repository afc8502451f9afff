"""Learning rates against tokens, any number of schedules in one figure; and the profile of a
refined schedule, from the log of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import EngFormatter

from lm.config import Config, UserError
from lm.families import SCHEDULES
from lm.report import figures, folder, legends, page
from lm.schedules import Run
from lm.schedules.refined import refine

POINTS = 1000  # of a curve, besides those at its joints
DIGITS = 6  # of a profile, as stored in the configuration
NORM = "optim/grad_norm"


class Drawn(NamedTuple):
    """A schedule over a run: `tokens` [n] before an update, ascending, and `rates` [n], float64."""

    label: str
    tokens: np.ndarray
    rates: np.ndarray
    peak: float


class Refining(NamedTuple):
    """The arguments of `refine` in lm/schedules/refined.py."""

    window: float
    quantile: float
    power: float
    points: int


def of_config(config: Config) -> dict[str, Any]:
    """The schedule of a configuration, by its label.

    Raises:
      UserError: a growing batch changes the rate too, which is not drawn.
    """
    if config.data.batch_warmup.rate_exponent:
        raise UserError(
            "data.batch_warmup.rate_exponent of --config is not drawn, only the schedule of the "
            "full batch; set --config.data.batch_warmup.rate_exponent=0"
        )
    return {"the experiment's": config.schedule}


def create(rules: Mapping[str, Any], tokens: int, tokens_per_step: int) -> list[Drawn]:
    """Schedules from label -> rule, each over a run of `tokens`.

    Raises:
      UserError: a rule does not fit the run.
    """
    for label, rule in rules.items():
        message = rule.misfit(run_tokens=tokens, tokens_per_step=tokens_per_step, is_branch=False)
        if message is not None:
            raise UserError(f"{label}: {message}")
    return [_drawn(label, rule, Run(tokens, tokens_per_step)) for label, rule in rules.items()]


def _drawn(label: str, rule: Any, run: Run) -> Drawn:
    made = rule.schedule(run)
    steps = np.linspace(0, run.tokens, POINTS + 1)
    # Both sides of a joint are sampled, so that a step is drawn as a step.
    joints = np.array([x + side for x in made.phases for side in (-1.0, 0.0, 1.0)])
    n = np.unique(np.clip(np.concatenate([steps, joints]), 0, run.tokens))
    return Drawn(label, n, np.asarray(made(n.astype(np.float32)), np.float64), made.peak)


def profile(workdir: Path, options: Refining) -> tuple[float, ...]:
    """The profile of a refined schedule, from the gradient norms that a run logged.

    Raises:
      UserError: there is no run, or not enough norms.
    """
    run = folder.load([workdir])[0]
    if run.config.get("data", {}).get("batch_warmup"):
        raise UserError(
            f"{workdir} has data.batch_warmup, and norms of batches of unlike sizes make no "
            "profile; name a run of one batch size"
        )
    _, norms = run.series(NORM, over="step")
    try:
        found = refine(norms, **options._asdict())
    except UserError as error:
        raise UserError(f"{workdir}: {error}") from None
    return tuple(round(float(x), DIGITS) for x in found)


def figure(drawn: Sequence[Drawn], *, is_wide: bool = True) -> str:
    """An SVG element with one line per schedule."""
    with figures.canvas("Learning rate against tokens", is_wide) as (axes, finish):
        for i, one in enumerate(drawn):
            rounds = i // len(figures.PALETTE) % len(figures.DASHES)
            ink: Any = {"color": figures.PALETTE[i % len(figures.PALETTE)]}
            axes.plot(one.tokens, one.rates, label=one.label, ls=figures.DASHES[rounds], **ink)
        axes.set_xlabel("tokens")
        axes.set_ylabel("learning rate")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
        legends.below(finish.figure, legends.named(axes))
        return finish()


def document(drawn: Sequence[Drawn], run: str) -> str:
    """A page with the figure and the rates along the run; `run` describes the run."""
    shares = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    head = ("schedule", "peak", "mean", *(f"at {share:.0%}" for share in shares))
    rows = []
    for one in drawn:
        at = np.interp(np.array(shares) * one.tokens[-1], one.tokens, one.rates)
        mean = np.trapezoid(one.rates, one.tokens) / one.tokens[-1]
        rows.append([one.label, *(f"{x:.4g}" for x in (one.peak, mean, *at))])
    body = f'<header><h1>Learning rates</h1><div class="soft">{page.text(run)}</div></header>\n'
    drawing = page.drawing(figure(drawn), figure(drawn, is_wide=False))
    body += page.section("Against tokens", f'<div class="figures">{drawing}</div>')
    body += page.section("Along the run", page.table(rows, head))
    return page.document("Learning rates", body, "Espalier learning rates")


def rule(values: Mapping[str, Any], where: str) -> Any:
    """A schedule from plain values; `where` names their place in messages.

    Raises:
      UserError: as SCHEDULES.create.
    """
    try:
        return SCHEDULES.create(values, "schedule")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def like(config: Config, values: Mapping[str, Any], where: str) -> Any:
    """A schedule for the run of a configuration. Unless `values` set them, it takes that schedule's
    peak, and its warmup if both have one.

    Raises:
      UserError: as SCHEDULES.create; or the schedule does not fit the run.
    """
    try:
        wanted = SCHEDULES.defaults(values.get("family"), "schedule")
        own = SCHEDULES.to_mapping(config.schedule)
        kept = {key: own[key] for key in ("peak_learning_rate", "warmup") if key in own}
        made = SCHEDULES.create(
            {k: x for k, x in kept.items() if k in wanted} | dict(values), "schedule"
        )
        misfit = made.misfit(
            run_tokens=config.run_tokens, tokens_per_step=config.tokens_per_step, is_branch=False
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if misfit is not None:
        raise UserError(f"{where}: {misfit}")
    return made
