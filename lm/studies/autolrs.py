"""AutoLRS (Jin et al. 2021, arXiv 2105.10762): the learning rate of every stage of a run, found by
short probes while it trains.

    for every stage of tau steps:
        for every probe: a rate (lm/studies/probes.py)
            -> tau / 10 steps at it, from the checkpoint where the stage begins
            -> the loss after tau steps, forecast
        tau steps at the best rate
    the decay of the configuration's schedule, from the last rate

Every probe and every stage is a run of its own (`decay_from`, with a decay that keeps its value).
So a killed search continues, and a stage is, bit for bit, that many steps at its rate. The warmup
is not searched: the first stage and its probes begin with it.

The gain of a probe is measured against weights that do not move. By default the loss is that on its
batches. All probes of a stage see the same batches, and so does one with a vanishing rate, whose
loss is subtracted; that removes the noise of the batches, which is far larger than the effect of a
few steps. With `validation` the loss is that on held-out text, a few times per probe. A probe that
is not below the loss at the stage's beginning throughout is then scored by its last loss and not by
a forecast, as in the published code [C].

After few steps a low rate looks better than it is: the loss falls because the noise of the steps
falls. So the search ends the run's high rate too early (Wu et al. 2018, arXiv 1803.02021, the bias
of a short horizon). With `anneal`, which is not in the paper, every probe ends in a linear decay to
zero over that many steps, and the held-out loss after the decay is the score of the probe.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm import files, metrics, train
from lm.config import Config, Duration, RunValues, UserError, convert, from_mapping, to_mapping
from lm.data import growth
from lm.run import checkpoint
from lm.schedules import Phased
from lm.studies import grid, probes
from lm.studies.trainer import Trainer, brief

FILE, STAGES, PROBE, DECAY = "search.json", "stage-{:03}", "probe-{}", "decay"
ANNEALED = "annealed"  # a folder inside that of a probe
POINTS = 4  # evaluations of a probe, if it is measured on held-out text
STILL = 1e-30  # a rate that moves no weight
SHARE = 10  # a probe takes one step for this many of its stage [C]
LEAST = 10  # steps of a probe: a curve cannot be fitted to fewer losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the learning rate.

    Attributes:
      run: a configuration whose schedule has a warmup and a decay, which are kept; its peak is not
        used
      lowest: lower bound of the learning rate
      highest: upper bound of the learning rate
      first_stage: steps of the first stage; each later stage takes twice as many
      longest_stage: most steps of a stage
      probes: number of probes of a stage
      validation: tokens of every validation set on which a probe is measured; 0: it is measured on
        its batches
      anneal: steps of decay to zero after each probe; 0: none
    """

    run: RunValues
    lowest: float
    highest: float
    first_stage: int
    longest_stage: int
    probes: int
    validation: int
    anneal: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage from step `start` to step `end`. `rates` and `forecasts` are those of its probes in
    order. A forecast is the change of the loss over the stage, nats per token; None if the probe
    diverged. `rate` is the chosen rate, 0 until all probes are made.
    """

    start: int
    end: int
    rates: tuple[float, ...]
    forecasts: tuple[Any, ...]
    rate: float


def create(mapping: Mapping[str, Any]) -> Search:
    """Nested plain values -> a search.

    Raises:
      UserError: an empty interval, no probes, stages too short to be probed, a schedule without
      warmup and decay, or a run that is refused.
    """
    search: Search = convert(Search, mapping, "config")
    if not 0 < search.lowest < search.highest:
        raise UserError(
            f"lowest={search.lowest:g} and highest={search.highest:g} are not an interval of "
            "learning rates; set 0 < lowest < highest"
        )
    if search.validation < 0:
        raise UserError(f"validation={search.validation} tokens must be >= 0 (0: training loss)")
    if search.anneal < 0 or (search.anneal and not search.validation):
        raise UserError(
            f"anneal={search.anneal} and validation={search.validation}: an annealed probe is "
            "measured on held-out text; set validation=16384 or more tokens, or anneal=0"
        )
    if search.probes < 2:
        raise UserError(f"probes={search.probes}: a choice needs at least 2")
    least = 3 * LEAST
    if search.first_stage < least or search.longest_stage < search.first_stage:
        raise UserError(
            f"first_stage={search.first_stage} and longest_stage={search.longest_stage}: a probe "
            f"takes {LEAST} steps, a third of a stage at most; set {least} <= first_stage <= "
            "longest_stage"
        )
    config = configuration(search)
    if config.init_from or config.decay_from:
        raise UserError("a search starts its run from step 0; set init_from and decay_from to ''")
    if first := config.data.batch_warmup.first:
        raise UserError(
            f"data.batch_warmup.first={first}, and a search finds the rate of one batch size; "
            f"{growth.REMEDY}"
        )
    if not isinstance(config.schedule, Phased):
        raise UserError(
            "a search keeps the warmup and the decay of a schedule with a stable phase; set "
            "schedule=wsd"
        )
    stages(search)
    return search


def configuration(search: Search) -> Config:
    """The run, with a record of every step, which the forecasts need."""
    config = from_mapping(to_mapping(dict(search.run)))
    log = dataclasses.replace(config.log, every=Duration(1, "steps"))
    return dataclasses.replace(config, log=log)


def stages(search: Search) -> list[tuple[int, int]]:
    """Start and end of every stage in steps; the first begins after the warmup.

    Raises:
      UserError: warmup and decay leave no stage.
    """
    config = configuration(search)
    start, decay = (config.steps(x) for x in (config.schedule.warmup, config.schedule.decay))
    end, length, found = config.run_steps - decay, search.first_stage, []
    if end - start < search.first_stage:
        raise UserError(
            f"warmup and decay leave {end - start} of {config.run_steps} steps, first_stage is "
            f"{search.first_stage}; lengthen run.length, or lower first_stage"
        )
    while start < end:
        # A remainder that is shorter than a stage belongs to the last one.
        stop = end if end - start < length + search.first_stage else start + length
        found.append((start, stop))
        start, length = stop, min(2 * length, search.longest_stage)
    return found


def run(
    search: Search,
    workdir: Path,
    data_dir: Path,
    report: Callable[[list[Stage]], None] = lambda found: None,
) -> list[Stage] | None:
    """Searches and trains every stage, and the decay; None if a signal stopped it. The last run is
    WORKDIR/decay, or that of the last stage if the schedule has no decay. `report` is called after
    every probe with the stages so far.

    Raises:
      UserError: the folder holds another search, or all probes of a stage diverged.
    """
    asked = {key: x for key, x in to_mapping(search).items() if key != "run"}
    asked |= {"run": grid.digest(search.run)}
    known, found = _read(workdir, asked), []
    work = _Work(search, configuration(search), workdir, Trainer(data_dir))
    for number, (start, end) in enumerate(stages(search)):
        stage = known[number] if number < len(known) else Stage(start, end, (), (), 0.0)
        while not stage.rate:
            probed = work.probed(number, stage)
            if probed is None:
                return None
            stage = probed
            _write(workdir, asked, [*found, stage])
            report([*found, stage])
        found.append(stage)
        if not work.staged(number, stage):
            return None
    return found if work.decayed(found) else None


@dataclasses.dataclass(frozen=True)
class _Work:
    search: Search
    config: Config
    workdir: Path
    trainer: Trainer

    def probed(self, number: int, stage: Stage) -> Stage | None:
        """The stage with one more probe, and after the last its rate; None if a signal came."""
        search, still = self.search, self.workdir / PROBE.format("still")
        losses = lambda x: math.inf if x is None else x
        known = [losses(x) for x in stage.forecasts]
        if len(stage.rates) == search.probes:
            if not any(map(math.isfinite, known)):
                raise UserError(
                    f"every probe of the stage from step {stage.start} on diverged, at rates from "
                    f"{min(stage.rates):.3g} to {max(stage.rates):.3g}; lower lowest and highest"
                )
            shutil.rmtree(still, ignore_errors=True)
            best = min(range(len(known)), key=lambda i: known[i])
            return dataclasses.replace(stage, rate=stage.rates[best])
        rate = probes.propose(stage.rates, known, search.lowest, search.highest)
        steps = max(LEAST, (stage.end - stage.start) // SHARE)
        at = number, stage.start, stage.start + steps
        if not self._train(*at, STILL, still, is_probe=True):
            return None
        place = self.workdir / PROBE.format(len(stage.rates))
        try:
            if not self._train(*at, rate, place, is_probe=True):
                return None
            if search.anneal and not self._anneal(rate, place, at[2]):
                return None
            value = self._change(number, stage, place, still)
        except train.DivergedError:
            value = math.inf
        shutil.rmtree(place)
        forecast = value if math.isfinite(value) else None
        return dataclasses.replace(
            stage, rates=(*stage.rates, rate), forecasts=(*stage.forecasts, forecast)
        )

    def _change(self, number: int, stage: Stage, place: Path, still: Path) -> float:
        """The forecast change of the loss over a stage at the rate of a probe."""
        start, length = stage.start, stage.end - stage.start
        if not self.search.validation:
            pairs = zip(_losses(place, start), _losses(still, start), strict=True)
            moved = [loss - before for loss, before in pairs]
            # The first loss is that of the weights before any update.
            return probes.forecast(range(len(moved)), moved, length)
        first = next(iter(_validated(still, start).values()))
        if self.search.anneal:
            last = [*_validated(place / ANNEALED, start).values()][-1]
            return last - first if math.isfinite(last) else math.inf
        found = {step - start: loss - first for step, loss in _validated(place, start).items()}
        if number:  # in the first stage the warmup lies in between
            found = {0: 0.0} | found
        times, moved = list(found), list(found.values())
        if not all(x < 0 for x in moved[-POINTS:]):  # a value that is not finite is not below
            return moved[-1] if math.isfinite(moved[-1]) else math.inf
        return probes.forecast(times, moved, length)

    def _anneal(self, rate: float, place: Path, end: int) -> bool:
        """Runs the decay of a probe in `place` that is at step `end`; returns whether it ended."""
        config = self._decaying(rate, self.search.anneal, place / checkpoint.FOLDER / str(end))
        config = self._measured(config, every=Duration(100, "percent"))
        return self.trainer.train(config, place / ANNEALED)

    def _measured(self, config: Config, every: Duration) -> Config:
        """A short run, evaluated at intervals and at its end on the search's validation tokens."""
        config = brief(config, is_evaluated=False)
        sizes = {"every": every, "max_tokens": self.search.validation}
        return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **sizes))

    def _decaying(self, rate: float, steps: int, start: Path) -> Config:
        """A run that decays linearly to zero from a checkpoint."""
        changes = {"warmup": Duration(0, "steps"), "decay": Duration(steps, "steps")}
        schedule = dataclasses.replace(self._constant(rate), **changes, final_ratio=0.0)
        return dataclasses.replace(self.config, schedule=schedule, decay_from=str(start))

    def staged(self, number: int, stage: Stage) -> bool:
        """Trains a stage at its rate; returns whether it ended."""
        place = self.workdir / STAGES.format(number)
        if checkpoint.steps(place)[-1:] == [stage.end] or self._later(number):
            return True
        is_done = self._train(number, stage.start, stage.end, stage.rate, place)
        if is_done and number:  # nothing starts from the previous stage any more
            before = self.workdir / STAGES.format(number - 1)
            shutil.rmtree(before / checkpoint.FOLDER, ignore_errors=True)
        return is_done

    def decayed(self, found: list[Stage]) -> bool:
        """Trains the decay, an ordinary run with a report; returns whether it ended."""
        steps = self.config.steps(self.config.schedule.decay)
        if not steps:
            return True
        own = self.config.schedule
        shape = {key: getattr(own, key) for key in ("decay_shape", "final_ratio", "half_life")}
        start = Path(self._checkpoint(len(found), found[-1].end))
        config = self._decaying(found[-1].rate, steps, start)
        schedule = dataclasses.replace(config.schedule, **shape)
        config = dataclasses.replace(config, schedule=schedule)
        return self.trainer.train(config, self.workdir / DECAY, with_report=True)

    def _later(self, number: int) -> bool:
        return (self.workdir / STAGES.format(number + 1)).exists()

    def _checkpoint(self, number: int, step: int) -> str:
        """The checkpoint at `step` where the stage before `number` ended."""
        return str(self.workdir / STAGES.format(number - 1) / checkpoint.FOLDER / str(step))

    def _train(
        self, number: int, start: int, end: int, rate: float, place: Path, *, is_probe: bool = False
    ) -> bool:
        """Trains from the end of the previous stage to step `end` at a constant rate; the first
        stage includes the warmup.
        """
        config, schedule = self.config, self._constant(rate)
        length = Duration(end, "steps")
        if number:
            decay, none = Duration(end - start, "steps"), Duration(0, "steps")
            schedule = dataclasses.replace(schedule, warmup=none, decay=decay)
            config = dataclasses.replace(config, decay_from=self._checkpoint(number, start))
        config = dataclasses.replace(
            config, schedule=schedule, run=dataclasses.replace(config.run, length=length)
        )
        if is_probe and self.search.validation and (rate == STILL or not self.search.anneal):
            points = 1 if rate == STILL else POINTS
            config = self._measured(config, Duration(max(1, (end - start) // points), "steps"))
        else:  # for an annealed probe only the loss after its decay is used
            config = brief(config, is_evaluated=False)
        return self.trainer.train(config, place)

    def _constant(self, rate: float) -> Any:
        """A schedule that stays at `rate` after its warmup, in a branch too."""
        steps = self.config.steps(self.config.schedule.warmup)
        options = {
            "family": "wsd",
            "peak_learning_rate": rate,
            "warmup": f"{steps} steps",
            "decay": "0 steps",
            "decay_shape": "linear",
            "final_ratio": 1.0,
        }
        return from_mapping(to_mapping(self.config) | {"schedule": options}).schedule


def loss(workdir: Path) -> float | None:
    """The loss at the end of the decay, nats per token, mean over the validation sets; None if the
    schedule has no decay.
    """
    losses = [*_validated(workdir / DECAY, 0).values()]
    return losses[-1] if losses else None


def _losses(workdir: Path, start: int) -> list[float]:
    """The training losses of every step after `start`, before its update."""
    return [line["train/nll"] for line in metrics.read(workdir) if line["step"] > start]


def _validated(workdir: Path, start: int) -> dict[int, float]:
    """step after `start` -> mean loss of the validation sets."""
    found = {}
    for line in metrics.read(workdir):
        losses = metrics.validation_losses(line)
        if line["step"] > start and losses:
            found[line["step"]] = sum(losses.values()) / len(losses)
    return found


def _read(workdir: Path, asked: Mapping[str, Any]) -> list[Stage]:
    path = workdir / FILE
    if not path.exists():
        return []
    values = files.read_json(path, "remove the folder to search again")
    if values.get("asked") != json.loads(json.dumps(asked)):
        raise UserError(f"{workdir} holds another search; choose a new workdir")
    return [convert(Stage, x, f"{path}: stage {i}") for i, x in enumerate(values["stages"])]


def _write(workdir: Path, asked: Mapping[str, Any], found: list[Stage]) -> None:
    values = {"asked": asked, "stages": [to_mapping(stage) for stage in found]}
    files.replace(workdir / FILE, json.dumps(values, indent=1, allow_nan=False) + "\n")
