"""The final loss of a schedule, predicted before it is trained, by the annealing law fitted to runs
of the same model, data and batch under other schedules.

Order of steps: `read` returns the rates and the logged losses of every run; `fit` the law with its
momentum held (one curve does not identify it); `predicted` the loss of a schedule with a band;
`scored` the prediction for a run that was not fitted, beside its measured loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.config import Config, UserError, difference, flatten, nearest, to_mapping
from lm.fits import curves
from lm.fits.curves import Curve, CurveFit
from lm.mapping import free_keys
from lm.report import folder
from lm.report.predict_loss import Line
from lm.run import formats
from lm.schedules import Run

MEMORY = 20  # the momentum remembers this fraction of a run: lambda = 1 - 20 / steps
LAST = 100  # the final loss is the mean over the last hundredth of the logged losses
FREE = ("schedule", "seed", "decay_from", "init_from")  # fitted runs may differ in these


class Trained(NamedTuple):
    """A run: its rates and losses, and its configuration."""

    name: str
    curve: Curve
    config: Config

    @property
    def tokens(self) -> np.ndarray:
        """The tokens at which losses were logged [n]."""
        return self.curve.steps * self.config.tokens_per_step


@dataclasses.dataclass(frozen=True)
class Row:
    """A schedule and its final loss, nats per token, with a band. `measured` is the loss that the
    run reached; None if it was not trained or was itself fitted.
    """

    schedule: str
    steps: int
    loss: float
    low: float
    high: float
    measured: float | None = None


def read(workdir: Path, key: str) -> Trained:
    """The rates of a run folder, and what it logged under `key`.

    Raises:
      UserError: no run there, or a key that it did not log.
    """
    run = folder.load([workdir])[0]
    if not run.config:
        raise UserError(f"{workdir} has no config.json, so its learning rates are not known")
    config = formats.read({formats.KEY: formats.FORMAT} | run.config, str(workdir))
    if first := config.data.batch_warmup.first:
        raise UserError(
            f"{workdir} has data.batch_warmup.first={first}, and the law is of one batch size; "
            "leave that run out"
        )
    steps, losses = run.series(key, over="step")
    if not len(steps):
        known = [k for k in run.keys("*") if k.split("/")[-1] in ("loss", "nll")]
        raise UserError(f"{workdir} has logged no {key!r}; {nearest(key, known)}")
    return Trained(
        run.name,
        Curve(rates(config.schedule, config, run.facts.get("decay_start")), steps, losses),
        config,
    )


def rates(rule: Any, config: Config, decay_start: float | None = None) -> np.ndarray:
    """The rate of every step of a run with this configuration under `rule` [steps], float64."""
    run = Run(config.run_tokens, config.tokens_per_step, decay_start)
    made = rule.schedule(run)
    steps = config.run_steps
    if decay_start is not None:
        steps = round(made.phases.decay_end / config.tokens_per_step)
    n = np.arange(steps, dtype=np.float64) * config.tokens_per_step
    return np.asarray(made(n.astype(np.float32)), np.float64)


def check_alike(runs: Sequence[Trained]) -> None:
    """The law holds for one model, data and batch; schedules, lengths and seeds may differ.

    Raises:
      UserError: two runs differ in something else.
    """
    first = runs[0]
    for other in runs[1:]:
        free = (*FREE, *free_keys(other.config))
        found = {
            name: values
            for name, values in difference(*map(_plain, (first, other))).items()
            if not any(f"{name}.".startswith(f"{prefix}.") for prefix in free)
        }
        if found:
            name, (ours, theirs) = next(iter(found.items()))
            raise UserError(
                f"{first.name} has {name}={ours!r}, {other.name} {theirs!r}; the law is of one "
                "model, data and batch: give runs that differ in their schedule"
            )


def _plain(run: Trained) -> dict[str, Any]:
    return flatten(to_mapping(run.config))


def momentum(runs: Sequence[Trained]) -> float:
    """The default lambda; it forgets within a twentieth of the longest run.

    Raises:
      UserError: no run is longer than 20 steps.
    """
    steps = max(len(run.curve.rates) for run in runs)
    if steps <= MEMORY:
        raise UserError(
            f"the longest run has {steps} steps, and the momentum is 1 - {MEMORY} / steps; give "
            f"runs of more than {MEMORY} steps, or set --momentum=0.5"
        )
    return 1.0 - MEMORY / steps


def fit(runs: Sequence[Trained], decay: float, bootstraps: int) -> CurveFit:
    """The annealing law of the runs.

    Raises:
      UserError: too few losses, or what `check_alike` raises.
    """
    check_alike(runs)
    return curves.annealing([run.curve for run in runs], decay=decay, bootstraps=bootstraps)


def predicted(found: CurveFit, label: str, rates: np.ndarray) -> Row:
    """The final loss of a schedule."""
    made = found.predict(rates, [len(rates)])
    loss, low, high = (float(x[0]) for x in made)
    return Row(label, len(rates), loss, low, high)


def scored(found: CurveFit, run: Trained) -> Row:
    """The prediction for the last losses of a run that was not fitted, and those losses."""
    count = max(1, len(run.curve.steps) // LAST)
    steps = run.curve.steps[-count:].astype(int)
    made = found.predict(run.curve.rates, steps.tolist())
    loss, low, high = (float(np.mean(x)) for x in made)
    measured = float(np.mean(run.curve.losses[-count:]))
    return Row(run.name, int(steps[-1]), loss, low, high, measured)


def lines(
    found: CurveFit,
    runs: Sequence[Trained],
    held_out: Sequence[Trained],
    schedules: Mapping[str, np.ndarray],
) -> list[Line]:
    """Lines of a figure: what every run logged, and the law's predictions for schedules."""
    per_step = runs[0].config.tokens_per_step
    asked = dict(schedules) | {f"{run.name}, predicted": run.curve.rates for run in held_out}
    measured = [Line(run.name, run.tokens, run.curve.losses) for run in (*runs, *held_out)]
    return measured + [Line(name, *_course(found, x, per_step)) for name, x in asked.items()]


def residual(found: CurveFit, runs: Sequence[Trained]) -> float:
    """The median absolute difference between the fitted losses and the law, nats per token."""
    losses = [run.curve.losses[run.curve.steps > np.argmax(run.curve.rates)] for run in runs]
    return float(np.median(np.abs(np.expm1(-found.residuals)) * np.concatenate(losses)))


def _course(
    found: CurveFit, rates: np.ndarray, tokens_per_step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss and its band at every step after the first peak."""
    steps = np.arange(int(np.argmax(rates)) + 1, len(rates) + 1)
    made = found.predict(rates, steps.tolist())
    return steps * tokens_per_step, made.loss, made.low, made.high
