"""Runs that differ in the pattern of mixers and the seed alone, at equal parameters and tokens.

    solve sizes -> train each (pattern, seed) and ask it the tasks -> time all in turn -> verdicts
    -> compare.json -> compare.md, compare.html, figures

A (pattern, seed) is a cell of a grid (lm/studies/grid.py), and so is the timing: every arrow
resumes, and several processes share the work. Equal are the parameters outside the
embedding, within `TOLERANCE` of the first pattern's: the width of the feed-forward is solved in
steps of 8, or the depth where no layer of the pattern has one. The order of the data depends on the
seed alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import build as build_lib
from lm import evals, files, train
from lm import layers as layer_lib
from lm.build import Build
from lm.config import Config, UserError, convert, from_mapping, to_mapping
from lm.data import prepare
from lm.evals import Given, Task
from lm.evaluation import evaluate
from lm.report import compared, comparison, folder
from lm.report import recall as recall_page
from lm.report.compared import Answer, Asked, Comparison, Curve, Row, Verdict
from lm.report.figures import standalone
from lm.run import checkpoint, record
from lm.studies import answers, grid, measure, recall, verdict
from lm.studies.answers import Questions, Reading
from lm.studies.grid import Grid

TOLERANCE, GRAIN = 0.01, 8  # of the parameters; of the feed-forward width
CURVE_POINTS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The runs of pattern `of` under other options of its layers; `layers`: label -> options."""

    of: str
    layers: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """`run`: a whole configuration. The other patterns are made equal to the first in size.
    `variants` are not trained: a pattern's runs read with other options of layers, as --layer gives
    them. `tasks`: as `evaluate.tasks` of a run, asked after training. `recall`: a whole study of
    recall (lm/studies/recall.py) that is made beside, or nothing. `decode_contexts` in tokens.
    """

    question: str
    run: Mapping[str, Any]
    patterns: tuple[str, ...]
    variants: Mapping[str, Variant]
    seeds: tuple[int, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    recall: Mapping[str, Any]
    timing_rounds: int
    decode_contexts: tuple[int, ...]


class Cell(NamedTuple):
    """One training, and what it is asked."""

    pattern: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that is at its last step and has answered: the answers are in its folder."""

    step: int


class Size(NamedTuple):
    """What makes a pattern as large as the first: the solved width or depth."""

    ffn_dim: int
    num_layers: int


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, an empty list, a name twice, or a run or task that is
      refused.
    """
    study: Study = convert(Study, mapping, "config")
    for name in ("patterns", "seeds"):
        values = getattr(study, name)
        if not values:
            raise UserError(f"config.{name} is empty; name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{name}={values} names one twice; name each once")
    if study.timing_rounds < 1:
        raise UserError(f"config.timing_rounds={study.timing_rounds} must be at least 1")
    if any(context < 1 for context in study.decode_contexts):
        raise UserError(f"config.decode_contexts={study.decode_contexts} must be positive")
    evals.create(study.tasks, "config.tasks")
    _check_names(study)
    if study.recall:
        recall.create(study.recall)
    for pattern in study.patterns:
        layer_lib.check(_config(study, pattern, study.seeds[0]).model)
    for name, variant in study.variants.items():
        if name in study.patterns or variant.of not in study.patterns:
            raise UserError(
                f"config.variants.{name}.of={variant.of!r}: a variant has a name of its own and is "
                f"of one of the patterns {', '.join(study.patterns)}"
            )
        model = _config(study, variant.of, study.seeds[0]).model
        layer_lib.change_layers(model, variant.layers)
    return study


def run(study: Study, workdir: Path, data_dir: Path) -> list[Row] | None:
    """The row of every pattern, from what the workdir holds or by work; None if a signal stopped
    it.

    Raises:
      UserError: parameters that cannot be made equal, or a mistake that training or a task reports.
    """
    plan = _plan(study, workdir, data_dir)
    _check(plan)
    work = functools.partial(_work, plan)
    if grid.run(plan.trainings, work, grid.all_of(plan.trainings)) is None:
        return None
    builds = {
        name: build(study, reading.of, plan.sizes[reading.of], reading.layers)
        for name, reading in plan.readings.items()
    }
    times = measure.timed(builds, study.timing_rounds, study.decode_contexts, workdir)
    return [_row(plan, name, built, times) for name, built in builds.items()]


class _Plan(NamedTuple):
    """A study, and what is worked out of it once. `readings`: the patterns themselves, and the
    variants.
    """

    study: Study
    data_dir: Path
    sizes: Mapping[str, Size]
    readings: Mapping[str, Variant]
    questions: Questions
    trainings: Grid[Cell, Trained]

    def config(self, cell: Cell) -> Config:
        return _config(self.study, *cell, self.sizes[cell.pattern])

    def reading(self, name: str, seed: int) -> Reading:
        place = self.trainings.place(Cell(self.readings[name].of, seed))
        return Reading(place, name, self.readings[name].layers)

    def of(self, cell: Cell) -> list[Reading]:
        """The readings of a training."""
        names = [name for name, one in self.readings.items() if one.of == cell.pattern]
        return [self.reading(name, cell.seed) for name in names]


def _plan(study: Study, workdir: Path, data_dir: Path) -> _Plan:
    """What a run answers depends on the questions, too. Where those or the configuration changed,
    the run goes on, which knows itself what may change, and is asked what it was not.
    """
    sizes = equal_sizes(study)
    questions = answers.questions(study.tasks, study.run["evaluate"]["max_tokens"])
    cells = [Cell(pattern, seed) for seed in study.seeds for pattern in study.patterns]
    asked = {
        cell: {
            "run": _config(study, *cell, sizes[cell.pattern]),
            "variants": {n: x.layers for n, x in study.variants.items() if x.of == cell.pattern},
            "questions": questions.asked,
        }
        for cell in cells
    }
    readings = {pattern: Variant(of=pattern, layers={}) for pattern in study.patterns}
    trainings = Grid(folder=workdir, outcome=Trained, asked=asked, if_changed="again")
    return _Plan(study, data_dir, sizes, readings | dict(study.variants), questions, trainings)


def _check(plan: _Plan) -> None:
    """All cells, before the first of them takes its hours."""
    cells = list(plan.trainings.asked)
    for cell in cells:
        record.check_unchanged(plan.trainings.place(cell), plan.config(cell))
        for reading in plan.of(cell):
            answers.known(reading)
    if len(grid.read(plan.trainings)) < len(cells):
        # A task that cannot be asked is told now, not after the training.
        data = plan.config(cells[0]).data
        prepared = prepare.prepare(data, plan.data_dir)
        given = Given(prepared.tokenizer, prepared, data, plan.questions.max_tokens)
        evaluate.prepare(plan.questions.tasks, given)


def _work(plan: _Plan, cell: Cell, place: Path) -> Trained | None:
    """Trains a run and asks it everything; None if a signal stopped it."""
    config = plan.config(cell)
    if not is_finished(place, config):
        options = train.Options(workdir=place, data_dir=plan.data_dir)
        if not train.run(config, options).finished:
            return None
    for reading in plan.of(cell):
        answers.ask(reading, plan.questions, plan.data_dir)
    return Trained(config.run_steps)


def _row(plan: _Plan, name: str, built: Build, times: measure.Times) -> Row:
    readings = [plan.reading(name, seed) for seed in plan.study.seeds]
    found = [answers.ask(reading, plan.questions, plan.data_dir) for reading in readings]
    is_trained = name in plan.study.patterns
    return Row(
        pattern=name,
        **plan.sizes[plan.readings[name].of]._asdict(),
        **_cost(built, times, name),
        curve=_curve([reading.workdir for reading in readings]) if is_trained else None,
        tasks=_by_task(plan.questions.tasks, found),
    )


def recalled(study: Study, workdir: Path) -> list[recall_page.Row] | None:
    """The rows of the study of recall, from what the workdir holds or by training; None if a signal
    stopped it.
    """
    if not study.recall:
        return []
    asked = recall.create(study.recall)
    found = recall.run(asked, recall.create_grid(asked, workdir / "recall", ()))
    return None if found is None else recall.rows(asked, found)


def verdicts(rows: Sequence[Row], variants: Collection[str] = ()) -> list[Verdict]:
    """Every pattern against the first, for the headline of every task; `variants`: those that were
    not trained.
    """
    found = []
    for label, asked in rows[0].tasks.items():
        name = asked.headline
        numbers = {
            row.pattern: [seed.numbers[name] for seed in row.tasks[label].seeds] for row in rows
        }
        what = label if name == label else f"{label} {name}"
        found += verdict.judge(
            what, numbers, is_better=asked.is_better, unit=asked.unit, variants=variants
        )
    return verdict.shortened(found)


def write(
    study: Study,
    rows: Sequence[Row],
    recalls: Sequence[recall_page.Row],
    head: Mapping[str, Any],
    workdir: Path,
) -> None:
    """compare.json, compare.md, compare.html and the figures in the workdir. `recalls`: what
    `recalled` gave.
    """
    found = Comparison(
        question=study.question,
        seeds=study.seeds,
        tokens=_config(study, study.patterns[0], study.seeds[0]).run_tokens,
        rows=tuple(rows),
        verdicts=tuple(verdicts(rows, study.variants)),
        recall=tuple(recalls),
        facts=head,
    )
    plain = compared.to_plain(found)
    files.replace(workdir / "compare.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    found = compared.from_mapping(plain)  # rounded: a committed file gives the same page again
    files.replace(workdir / "compare.md", comparison.markdown(found))
    files.replace(workdir / "compare.html", comparison.page(found))
    for name, svg in comparison.figures(found).items():
        files.replace(workdir / f"{name}.svg", standalone(svg))


def _check_names(study: Study) -> None:
    """Runs, and patterns and variants beside each other in one, need files of their own."""
    grid.check_names([Cell(pattern, seed) for pattern in study.patterns for seed in study.seeds])
    grid.check_names([(name,) for name in (*study.patterns, *study.variants)])


def _config(study: Study, pattern: str, seed: int, size: Size | None = None) -> Config:
    values: Any = to_mapping(dict(study.run))
    values |= {"seed": seed}
    values["model"] = values["model"] | {"pattern": pattern}
    if size is not None:
        values["model"] |= size._asdict()
    return from_mapping(values)


def build(
    study: Study, pattern: str, size: Size, layers: Mapping[str, Mapping[str, Any]] | None = None
) -> Build:
    """Everything to train the pattern at this size, with other options of `layers`."""
    config = _config(study, pattern, study.seeds[0], size)
    model = layer_lib.change_layers(config.model, layers or {})
    return build_lib.build(dataclasses.replace(config, model=model), jax.devices())


def equal_sizes(study: Study) -> dict[str, Size]:
    """The size of every pattern: its feed-forward width by the straight line through two, or, where
    no layer has one, its depth.
    """

    def count(pattern: str, size: Size) -> int:
        return measure.parameters(build(study, pattern, size))

    first = study.patterns[0]
    model = _config(study, first, study.seeds[0]).model
    given = Size(model.ffn_dim, model.num_layers)
    target, sizes = count(first, given), {first: given}
    for pattern in study.patterns[1:]:
        small, large = (count(pattern, given._replace(ffn_dim=n * GRAIN)) for n in (1, 2))
        slope = (large - small) / GRAIN
        if not slope:
            sizes[pattern] = _equal_depth(study, pattern, given, target)
            continue
        wanted = GRAIN + (target - small) / slope
        width = max(GRAIN, GRAIN * round(wanted / GRAIN))
        found = small + slope * (width - GRAIN)
        if abs(found - target) > TOLERANCE * target:
            raise UserError(
                f"pattern {pattern!r} has {found:,.0f} parameters at ffn_dim={width}, "
                f"{first!r} has {target:,}; set a larger run.model.ffn_dim"
            )
        sizes[pattern] = given._replace(ffn_dim=width)
    return sizes


def _equal_depth(study: Study, pattern: str, given: Size, target: int) -> Size:
    """The depth nearest to `target` parameters: half a layer is the best there is."""
    period = len(pattern.split(","))
    sizes = [given._replace(num_layers=n * period) for n in (1, 2)]
    one, two = (measure.parameters(build(study, pattern, size)) for size in sizes)
    periods = max(1, round(1 + (target - one) / (two - one)))
    return given._replace(num_layers=periods * period)


def is_finished(workdir: Path, config: Config) -> bool:
    """Whether the run's last step has been saved and its report written."""
    steps = checkpoint.steps(workdir) if (workdir / "report.html").exists() else []
    return bool(steps) and steps[-1] == config.run_steps


def _cost(built: Build, times: measure.Times, name: str) -> dict[str, Any]:
    """The fields of a row that say what a pattern costs."""
    step, decoding = times.training[name], times.decoding[name]
    contexts = [int(context) for context in decoding]
    return {
        "parameters": measure.parameters(built),
        "seconds": step.seconds,
        "tokens_per_second": built.config.tokens_per_step / step.seconds,
        "peak_bytes": step.peak_bytes,
        "flops_per_token": build_lib.flops_per_token(built),
        "decode_seconds": {context: decoding[str(context)] for context in contexts},
        "state_bytes": {
            context: measure.state_bytes(built.model, context)
            for context in sorted({built.config.data.context_length, *contexts})
        },
    }


def _curve(workdirs: Sequence[Path]) -> Curve:
    """Training bits per byte of every seed, thinned to means of neighbors."""
    runs = folder.load(workdirs)
    tokens, _ = runs[0].series("train/bpb")
    parts = np.array_split(np.arange(len(tokens)), min(CURVE_POINTS, len(tokens)))
    thin = lambda values: tuple(round(float(values[part].mean()), 5) for part in parts)
    return Curve(thin(tokens), tuple(thin(run.series("train/bpb")[1]) for run in runs))


def _by_task(tasks: Mapping[str, Task], found: Sequence[Mapping[str, Answer]]) -> dict[str, Asked]:
    return {
        label: Asked(
            headline=task.headline,
            is_better=task.is_better,
            unit=task.unit,
            seeds=tuple(one[label] for one in found),
        )
        for label, task in tasks.items()
    }
