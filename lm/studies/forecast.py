"""A forecast: the loss of a bigger run, written down before the run starts, and scored afterwards.

    table of small runs -> law of losses -> predicted loss with its interval -> FILE, committed
    FILE and the run's folder -> the loss of the run, and whether it lies in the interval -> FILE

The file identifies the run by the digest of its configuration (what no resumed run may change, its
length and the contents of its text). It also holds the time when it was written and the digest of
the forecast itself. A run that began earlier is not scored, and neither is a run with another
configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import build as build_lib
from lm import files, metrics
from lm import params as params_lib
from lm.config import Config, Duration, UserError, from_mapping, to_mapping
from lm.fits import fit, laws
from lm.fits.fit import Fitted
from lm.fits.table import Table, with_derived
from lm.report import folder
from lm.report.folder import Run
from lm.studies import answers, cells, grid

FACTOR = 30.0  # the run's compute over that of the largest fitted run, at least
READS = {"body_parameters", "tokens", "compute", "tokens_per_parameter"}
# Columns in which rows and the run must agree, because otherwise their losses are not comparable.
SAME = ("mixer", "vocab", "context")


@dataclasses.dataclass(frozen=True)
class Target:
    """The run that is forecast; `digest` is that of its configuration."""

    digest: str
    body_parameters: int
    tokens: int
    mixer: str
    vocab: int
    context: int

    @property
    def columns(self) -> dict[str, np.ndarray]:
        own = {"body_parameters": self.body_parameters, "tokens": self.tokens}
        return with_derived({k: np.array([float(v)]) for k, v in own.items()})


def digest(config: Config) -> str:
    """A digest that is equal for configurations of the same run."""
    length = Duration(config.run_steps, "steps")
    exact = dataclasses.replace(config, run=dataclasses.replace(config.run, length=length))
    return grid.digest(cells.asked(exact, answers.digest))


def target(config: Config) -> Target:
    """What a forecast needs from a configuration; its model is built but not trained."""
    return Target(
        digest=digest(config),
        body_parameters=_body(config),
        tokens=config.run_tokens,
        mixer=_mixer(config),
        vocab=config.data.tokenizer.vocab_size,
        context=config.data.context_length,
    )


def table_of(workdirs: Sequence[Path]) -> Table:
    """Finished runs as a table, with one row per run and each run as its own trunk.

    Raises:
      UserError: a folder is not a finished run.
    """
    rows, bodies = [], {}
    for run in folder.load(workdirs):
        config = _config(run)
        model = json.dumps(to_mapping(config.model))
        if model not in bodies:
            bodies[model] = _body(config)  # it takes a second
        row = {"trunk": str(run.path), "seed": config.seed, "tokens": config.run_tokens}
        row |= {"learning_rate": config.schedule.peak_learning_rate, "mixer": _mixer(config)}
        row |= {"vocab": config.data.tokenizer.vocab_size, "width": config.model.width}
        row |= {"context": config.data.context_length, "body_parameters": bodies[model]}
        rows.append(row | {"batch_tokens": config.tokens_per_step, "loss": _loss(run, config)})
    texts = ("trunk", "mixer")
    columns = {
        name: np.array([r[name] for r in rows], dtype=object if name in texts else np.float64)
        for name in rows[0]
    }
    return Table(", ".join(str(path) for path in workdirs), with_derived(columns))


def make(
    law_name: str,
    table: Table,
    run: Target,
    options: laws.Options,
    *,
    factor: float = FACTOR,
    most_compute: float = 0.0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """The forecast of a run as plain values, from the rows of a table with at most `most_compute`
    FLOPs (0: all rows).

    Raises:
      UserError: the law does not predict losses from sizes and tokens; the table's losses are not
      comparable; or the run has less than `factor` times the compute of the largest fitted one.
    """
    law = laws.find(law_name)
    reads = {name for equation in law.equations for name in equation.reads}
    if {e.target for e in law.equations} != {"loss"} or not reads <= READS:
        raise UserError(
            f"law {law_name!r} does not predict losses from {', '.join(sorted(READS))}; take "
            "chinchilla, over_training or compute"
        )
    if not options.bootstraps:
        raise UserError("--bootstraps=0: a forecast needs its interval; set --bootstraps=1000")
    _check_same(table, run)
    (equation,) = laws.equations(law, options)
    with _own_advice():
        selected = laws.rows(equation, _at_most(table, most_compute))
    largest = float(np.max(with_derived(selected.columns)["compute"]))
    compute = float(run.columns["compute"][0])
    if compute < factor * largest:
        raise UserError(
            f"the run has {compute:.3g} FLOPs, {compute / largest:.3g} times the {largest:.3g} of "
            f"the largest fitted run, less than {factor:g}; set a longer run.length or a wider "
            "model, or fit smaller runs"
        )
    with _own_advice():
        fitted = fit.fit(
            equation, selected, bootstraps=options.bootstraps, seed=options.seed, progress=progress
        )
    return _plain(law_name, fitted, run, largest, options)


def _plain(
    law_name: str, fitted: Fitted, run: Target, largest: float, options: laws.Options
) -> dict[str, Any]:
    """What a forecast's file records about the fit and the run."""
    center, low, high = _interval(fitted, run, options.seed)
    compute = float(run.columns["compute"][0])
    return {
        "law": law_name,
        "rows": len(fitted.selected),
        "clusters": int(fitted.clusters.max()) + 1,
        "selection": fitted.equation.selection,
        "values": fitted.values,
        "intervals": {name: list(ends) for name, ends in fitted.intervals.items()},
        "held": dict(options.hold),
        "warnings": list(fitted.warnings),
        "left_out": list(fitted.selected.left_out),
        "largest_compute": largest,
        "config_digest": run.digest,
        "body_parameters": run.body_parameters,
        "tokens": run.tokens,
        "compute": compute,
        "times": compute / largest,
        "loss": center,
        "low": low,
        "high": high,
        "level": fit.LEVEL,
    }


def _interval(fitted: Fitted, run: Target, seed: int) -> tuple[float, float, float]:
    """The predicted loss and the interval for the measured loss: every bootstrap, plus the scatter
    of the rows around the law. It does not include the error of the law itself at such a distance.
    """
    center, made = fitted.predict(run.columns)
    count, wanted = len(fitted.residuals), len(fitted.theta)
    # Residuals are smaller than errors, because a fit of `wanted` constants adapts to the rows.
    errors = fitted.residuals * math.sqrt(count / (count - wanted))
    drawn = np.random.default_rng(seed).choice(errors, size=len(made))
    ends = fit.interval(made[:, 0] * np.exp(drawn), int(fitted.clusters.max()) + 1)
    return float(center[0]), float(ends[0]), float(ends[1])


def write(path: Path, head: Mapping[str, Any], forecast: Mapping[str, Any]) -> None:
    """Writes a forecast that is not yet scored.

    Raises:
      UserError: the file exists already.
    """
    if path.exists():
        raise UserError(f"{path} is there, and a forecast is not written twice; name another file")
    values = dict(head) | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(),
        "forecast": dict(forecast),
        "score": None,
    }
    _save(path, values)


def read(path: Path) -> dict[str, Any]:
    """A forecast from its file.

    Raises:
      UserError: it is not a forecast, or was changed after it was written.
    """
    values = files.read_json(path, "name the file that espalier forecast wrote")
    if not {"forecast", "date", "score", "sha256"} <= values.keys():
        raise UserError(f"{path} is not a forecast; name the file that espalier forecast wrote")
    if values["sha256"] != _sealed(values):
        raise UserError(f"{path} was changed after it was written; restore it")
    return values


def score(path: Path, workdir: Path) -> dict[str, Any]:
    """Adds the loss of the run to the forecast, and returns the complete forecast.

    Raises:
      UserError: the forecast is damaged, already scored, or later than the run's start; the run is
      a different one, or not finished.
    """
    values = read(path)
    if values["score"] is not None:
        raise UserError(f"{path} is scored already, by a run that began {values['score']['began']}")
    (run,) = folder.load([workdir])
    config = _config(run)
    if (own := digest(config)) != values["forecast"]["config_digest"]:
        raise UserError(
            f"{workdir} holds a run whose configuration has digest {own}; the forecast is of "
            f"{values['forecast']['config_digest']}: name that run"
        )
    began = _began(run)
    if datetime.datetime.fromisoformat(values["date"]) >= began:
        raise UserError(
            f"the forecast was written {values['date']}, and the run began {began.isoformat()}, "
            "before it: it is not a forecast of that run"
        )
    loss = _loss(run, config)
    forecast = values["forecast"]
    values["score"] = {
        "loss": loss,
        "error": loss - forecast["loss"],
        "is_inside": forecast["low"] <= loss <= forecast["high"],
        "began": began.isoformat(),
        "commit": run.facts.get("commit", "unknown"),
        "device": run.facts.get("device_kind", "unknown"),
    }
    _save(path, values)
    return values


def _save(path: Path, values: dict[str, Any]) -> None:
    values["sha256"] = _sealed(values)
    files.replace(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def _sealed(values: Mapping[str, Any]) -> str:
    """A digest of everything in the file except itself."""
    plain = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _own_advice() -> Iterator[None]:
    """Replaces the remedies of a fit, which are flags of espalier fit."""
    try:
        yield
    except UserError as error:
        what = str(error).partition("; ")[0]
        raise UserError(f"{what}; see what espalier fit says of this table") from None


def _at_most(table: Table, compute: float) -> Table:
    """The rows with at most this many FLOPs; 0 means all."""
    if "compute" not in table.columns or not compute:
        return table
    is_kept = table.columns["compute"] <= compute
    if not is_kept.any():
        least = float(np.min(table.columns["compute"]))
        raise UserError(
            f"--most_compute={compute:g} leaves no row of {table.name}, whose least has "
            f"{least:.3g} FLOPs; raise it"
        )
    note = f"{int(np.sum(~is_kept))} of {len(table)} rows have more than {compute:g} FLOPs"
    return dataclasses.replace(table.take(is_kept), left_out=(*table.left_out, note))


def _check_same(table: Table, run: Target) -> None:
    for name in SAME:
        wanted = getattr(run, name)
        if name not in table.columns:
            continue
        plain = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
        others = {plain(value) for value in table.columns[name]} - {plain(wanted), f"{wanted}"}
        if others:
            raise UserError(
                f"{table.name} has rows of {name}={sorted(others)[0]}, and the run has "
                f"{name}={wanted}: their losses follow another law; leave those rows out"
            )


def _mixer(config: Config) -> str:
    """The pattern as a sweep's table writes it (lm/studies/rows.py)."""
    pattern = config.model.pattern
    return pattern if isinstance(pattern, str) else json.dumps(to_mapping(pattern))


def _body(config: Config) -> int:
    """Parameters without embedding and head."""
    return params_lib.count(build_lib.local(config).infos, without="vocab")["total"]


def _config(run: Run) -> Config:
    return from_mapping(run.config)


def _loss(run: Run, config: Config) -> float:
    """The mean over validation sets after the last step, nats per token, as in a table."""
    last = run.records[-1] if run.records else {"step": 0}
    if last["step"] < config.run_steps:
        raise UserError(
            f"{run.path} is at step {last['step']} of {config.run_steps}; finish that run first"
        )
    losses = [*metrics.validation_losses(last).values()]
    if not losses or not all(map(math.isfinite, losses)):
        raise UserError(f"{run.path} has no finite validation loss after its last step")
    return sum(losses) / len(losses)


def _began(run: Run) -> datetime.datetime:
    """The earliest sign of the run: the start of its last launch, or the mark of its first launch,
    which a resumed run does not write again.
    """
    signs = (
        [datetime.datetime.fromisoformat(run.facts["started"])] if "started" in run.facts else []
    )
    if (mark := run.path / files.MARK).exists():
        signs.append(datetime.datetime.fromtimestamp(mark.stat().st_mtime, datetime.UTC))
    if not signs:
        raise UserError(f"{run.path} does not say when it was started; restore its run.json")
    return min(signs)
