"""What loss a schedule will end at, before it is trained: the annealing law, fitted to runs of the
same model, data and batch under other schedules.

Order of steps: `read` gives the rates and the logged losses of every run, `fit` the law with its
momentum held (one curve does not identify it), `predicted` the loss of a schedule with a band,
`scored` that of a run that was not fitted beside what it came to.
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

MEMORY = 20  # the momentum remembers so many parts of a run less than the whole: 1 - 20 / steps
LAST = 100  # the final loss is the mean over the last hundredth of the logged ones
FREE = ("schedule", "seed", "decay_from", "init_from")  # of what runs that are fitted may differ in


class Trained(NamedTuple):
    """A run: its rates and losses, and the configuration that it had."""

    name: str
    curve: Curve
    config: Config

    @property
    def tokens(self) -> np.ndarray:
        """Where a loss was logged [n]."""
        return self.curve.steps * self.config.tokens_per_step


@dataclasses.dataclass(frozen=True)
class Row:
    """A schedule and the loss it ends at, nats a token, with its band; `measured`: what the run
    came to, None where it was not trained or was itself fitted.
    """

    schedule: str
    steps: int
    loss: float
    low: float
    high: float
    measured: float | None = None


def read(workdir: Path, key: str) -> Trained:
    """A run folder as its rates, and what it logged under `key`.

    Raises:
      UserError: no run, or a key that it did not log.
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
    """The rate of every step of a run of this configuration under `rule` [steps], float64."""
    run = Run(config.run_tokens, config.tokens_per_step, decay_start)
    made = rule.schedule(run)
    steps = config.run_steps
    if decay_start is not None:
        steps = round(made.phases.decay_end / config.tokens_per_step)
    n = np.arange(steps, dtype=np.float64) * config.tokens_per_step
    return np.asarray(made(n.astype(np.float32)), np.float64)


def check_alike(runs: Sequence[Trained]) -> None:
    """The law is of one model, data and batch; schedules, lengths and seeds may differ.

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
    """The default lambda: it forgets within a twentieth of the longest run.

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
    """Where a schedule ends."""
    made = found.predict(rates, [len(rates)])
    loss, low, high = (float(x[0]) for x in made)
    return Row(label, len(rates), loss, low, high)


def scored(found: CurveFit, run: Trained) -> Row:
    """A run that was not fitted, at its last losses, beside what they were."""
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
    """For a figure: what every run logged, and what the law makes of schedules by their rates."""
    per_step = runs[0].config.tokens_per_step
    asked = dict(schedules) | {f"{run.name}, predicted": run.curve.rates for run in held_out}
    measured = [Line(run.name, run.tokens, run.curve.losses) for run in (*runs, *held_out)]
    return measured + [Line(name, *_course(found, x, per_step)) for name, x in asked.items()]


def residual(found: CurveFit, runs: Sequence[Trained]) -> float:
    """Median of the absolute differences between the fitted losses and the law, nats a token."""
    losses = [run.curve.losses[run.curve.steps > np.argmax(run.curve.rates)] for run in runs]
    return float(np.median(np.abs(np.expm1(-found.residuals)) * np.concatenate(losses)))


def _course(
    found: CurveFit, rates: np.ndarray, tokens_per_step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss, and its band, at every step after the first peak."""
    steps = np.arange(int(np.argmax(rates)) + 1, len(rates) + 1)
    made = found.predict(rates, steps.tolist())
    return steps * tokens_per_step, made.loss, made.low, made.high
