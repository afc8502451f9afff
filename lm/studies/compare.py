"""Runs that differ only in the pattern of mixers and the seed, at equal parameters and tokens.

    solve sizes -> time all in turn -> train each (pattern, seed), evaluate the tasks -> verdicts
    -> compare.json -> compare.md, compare.html, figures

Each (pattern, seed) is a cell of a grid (lm/studies/grid.py), and so is the timing. So every step
above can be resumed, and several processes share the work. "Equal" refers to the parameters outside
the embedding, within one percent of the first pattern's (lm/studies/sizes.py). The order of the
data depends only on the seed.

The page is written whenever all patterns of a seed are trained. Its compare.json is the table of
the study: a study that is started again with this table, in any folder and on any machine, does not
train the cells that it holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import build as build_lib
from lm import files, train
from lm.build import Build
from lm.config import Config, to_mapping
from lm.data import prepare
from lm.evals import Given
from lm.evaluation import evaluate
from lm.report import compared, comparison, folder
from lm.report import recall as recall_page
from lm.report.compared import Asked, Comparison, Curve, Row
from lm.report.figures import standalone
from lm.run import checkpoint, record
from lm.studies import answers, grid, measure, recall, speedup, verdict
from lm.studies.answers import Questions, Reading
from lm.studies.grid import Entry, Grid
from lm.studies.sizes import Size
from lm.studies.study import Cell, Study, Variant, build, configuration, equal_sizes

CURVE_POINTS = 60


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run, as plain values for JSON: its curve (a `compared.Curve` of one seed), and the
    answers of its readings, answers[reading][label].
    """

    curve: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, Any]]


def run(
    study: Study,
    workdir: Path,
    data_dir: Path,
    *,
    table: Sequence[Entry[Trained]] = (),
    report: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row] | None:
    """The row of every pattern, from the workdir, from the table or by training; None if a signal
    stopped it. `report` is called with the rows of the first seed, of the first two seeds and so on
    as they are trained, but not with all seeds.

    Raises:
      UserError: parameters cannot be made equal, or training or a task reports a mistake.
    """
    for pattern in study.patterns:
        build_lib.check(configuration(study, pattern, study.seeds[0]))
    plan = _plan(study, workdir, data_dir, table)
    known = _check(plan)
    builds = {
        name: build(study, reading.of, plan.sizes[reading.of], reading.layers)
        for name, reading in plan.readings.items()
    }
    times = measure.timed(builds, study.timing_rounds, study.decode_contexts, workdir)
    costs = {name: _cost(built, times, name) for name, built in builds.items()}
    rows: list[Row] = []
    work = functools.partial(_work, plan, new_only=_new_only())
    for num in range(1, len(study.seeds) + 1):
        cells = [cell for cell in plan.trainings.asked if cell.seed in study.seeds[:num]]
        left = lambda found, cells=cells: [cell for cell in cells if cell not in found]
        found = grid.run(plan.trainings, work, left)
        if found is None:
            return None
        rows = [_row(plan, name, costs[name], found, study.seeds[:num]) for name in builds]
        if num < len(study.seeds) and not known.keys() >= set(cells):
            report(rows)
    return rows


class _Plan(NamedTuple):
    """A study, and values computed from it once. `readings` are the patterns themselves and the
    variants.
    """

    study: Study
    data_dir: Path
    sizes: Mapping[str, Size]
    readings: Mapping[str, Variant]
    questions: Questions
    trainings: Grid[Cell, Trained]

    def config(self, cell: Cell) -> Config:
        return configuration(self.study, *cell, self.sizes[cell.pattern])

    def reading(self, name: str, seed: int) -> Reading:
        place = self.trainings.place(Cell(self.readings[name].of, seed))
        return Reading(place, name, self.readings[name].layers)

    def of(self, cell: Cell) -> list[Reading]:
        """The readings of one training."""
        names = [name for name, one in self.readings.items() if one.of == cell.pattern]
        return [self.reading(name, cell.seed) for name in names]


def _plan(study: Study, workdir: Path, data_dir: Path, table: Sequence[Entry[Trained]]) -> _Plan:
    """An answer depends on the questions too. Where the questions or the configuration have
    changed, the run continues if its own checks allow the change, and only new questions are asked.
    """
    solved = equal_sizes(study)
    questions = answers.questions(study.tasks, study.run["evaluate"]["max_tokens"])
    content = {name: _content(x["path"]) for name, x in study.run["data"]["sources"].items()}
    asked = {}
    for seed in study.seeds:
        for pattern in study.patterns:
            config = to_mapping(configuration(study, pattern, seed, solved[pattern]))
            for name, found in content.items():
                config["data"]["sources"][name]["path"] = found
            asked[Cell(pattern, seed)] = {
                "run": config,
                "variants": {n: x.layers for n, x in study.variants.items() if x.of == pattern},
                "questions": questions.asked,
            }
    readings = {pattern: Variant(of=pattern, layers={}) for pattern in study.patterns}
    trainings = Grid(folder=workdir, outcome=Trained, asked=asked, table=table, if_changed="again")
    return _Plan(study, data_dir, solved, readings | dict(study.variants), questions, trainings)


def _content(path: str) -> str:
    """What a source's path stands for, on any machine."""
    return f"Python {platform.python_version()}" if path == "stdlib" else answers.digest(path)


def _check(plan: _Plan) -> dict[Cell, Trained]:
    """Checks all cells before the first of them takes hours, and returns the finished ones."""
    cells, found = list(plan.trainings.asked), grid.read(plan.trainings)
    for cell in cells:
        record.check_unchanged(plan.trainings.place(cell), plan.config(cell))
        for reading in plan.of(cell):
            answers.known(reading)
    if len(found) < len(cells):
        # A task that cannot be evaluated is reported now and not after the training.
        data = plan.config(cells[0]).data
        prepared = prepare.prepare(data, plan.data_dir)
        given = Given(prepared.tokenizer, prepared, data, plan.questions.max_tokens)
        evaluate.prepare(plan.questions.tasks, given)
    return found


def _new_only() -> Callable[[logging.LogRecord], bool]:
    """A filter of a logger that lets every message through once."""
    seen = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_known = message in seen
        seen.add(message)
        return not is_known

    return is_new


def _work(
    plan: _Plan, cell: Cell, place: Path, *, new_only: Callable[[logging.LogRecord], bool]
) -> Trained | None:
    """Trains a run and evaluates everything; None if a signal stopped it. How often a run is
    evaluated is the same in all runs, so a warning about it passes `new_only`.
    """
    config = plan.config(cell)
    if not is_finished(place, config):
        options = train.Options(workdir=place, data_dir=plan.data_dir)
        evaluate.log.addFilter(new_only)
        try:
            if not train.run(config, options).finished:
                return None
        finally:
            evaluate.log.removeFilter(new_only)
    found, tasks = {}, plan.questions.tasks
    for reading in plan.of(cell):
        answered = answers.ask(reading, plan.questions, plan.data_dir)
        found[reading.name] = {
            label: compared.plain_answer(x, tasks[label].headline) for label, x in answered.items()
        }
    return Trained(compared.finite(to_mapping(_curve(place))), compared.finite(found))


def _row(
    plan: _Plan,
    name: str,
    cost: Mapping[str, Any],
    found: Mapping[Cell, Trained],
    seeds: Sequence[int],
) -> Row:
    pattern, is_trained = plan.readings[name].of, name in plan.study.patterns
    cells = [Cell(pattern, seed) for seed in seeds]
    curves = [compared.curve(found[cell].curve) for cell in cells]
    return Row(
        pattern=name,
        **plan.sizes[pattern]._asdict(),
        **cost,
        curve=_together(curves) if is_trained else None,
        tasks={
            label: Asked(
                headline=task.headline,
                is_better=task.is_better,
                unit=task.unit,
                seeds=tuple(compared.answer(found[x].answers[name][label]) for x in cells),
            )
            for label, task in plan.questions.tasks.items()
        },
        cells=tuple(grid.digest(plan.trainings.asked[x]) for x in cells),
    )


def cells(before: Comparison) -> list[Entry[Trained]]:
    """The cells that a comparison holds, for a study that is started elsewhere."""
    curves: dict[str, Curve] = {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in before.rows:
        for i, cell in enumerate(row.cells):  # a variant has the cells of its pattern
            if row.curve is not None:
                curves[cell] = Curve(row.curve.tokens, (row.curve.bits[i],))
            found.setdefault(cell, {})[row.pattern] = {
                label: compared.plain_answer(task.seeds[i], task.headline)
                for label, task in row.tasks.items()
            }
    return [
        Entry(cell, cell, Trained(to_mapping(curves[cell]), compared.finite(answered)))
        for cell, answered in found.items()
        if cell in curves
    ]


def recalled(
    study: Study, workdir: Path, before: Comparison | None = None
) -> list[recall_page.Row] | None:
    """The rows of the study of recall: from the workdir, from `before` (a comparison with the same
    recall study), or by training; None if a signal stopped it.
    """
    if not study.recall:
        return []
    if before is not None and before.recall_asked == grid.digest(study.recall):
        return list(before.recall)
    asked = recall.create(study.recall)
    found = recall.run(asked, recall.create_grid(asked, workdir / "recall", ()))
    return None if found is None else recall.rows(asked, found)


def write(
    study: Study,
    rows: Sequence[Row],
    recalls: Sequence[recall_page.Row],
    head: Mapping[str, Any],
    workdir: Path,
) -> None:
    """Writes compare.json, compare.md, compare.html and the figures to the workdir. `rows` are of
    all seeds or of the first few; `recalls` is the result of `recalled`.
    """
    found = Comparison(
        question=study.question,
        seeds=study.seeds[: len(rows[0].tasks["bits_per_byte"].seeds)],
        tokens=configuration(study, study.patterns[0], study.seeds[0]).run_tokens,
        rows=tuple(rows),
        primary=tuple(to_mapping(study.primary)),
        verdicts=tuple(verdict.judge(rows, study.primary, study.seeds)),
        differences=tuple(verdict.rest(rows, study.primary)),
        speed_ups=tuple(speedup.speed_ups(rows)),
        recall=tuple(recalls),
        recall_asked=grid.digest(study.recall) if recalls else "",
        facts=head,
    )
    plain = compared.to_plain(found)
    text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    # Lists of numbers are put on one line: they are most of the file.
    text = re.sub(r"\[\s+([-\d.,e\snul]+?)\s+\]", lambda x: f"[{' '.join(x[1].split())}]", text)
    files.replace(workdir / "compare.json", text)
    found = compared.from_mapping(plain)  # rounded, so a committed file gives the same page again
    files.replace(workdir / "compare.md", comparison.markdown(found))
    files.replace(workdir / "compare.html", comparison.page(found))
    for name, svg in comparison.figures(found).items():
        files.replace(workdir / f"{name}.svg", standalone(svg))


def is_finished(workdir: Path, config: Config) -> bool:
    """Whether the run's last step is saved and its report written."""
    steps = checkpoint.steps(workdir) if (workdir / "report.html").exists() else []
    return bool(steps) and steps[-1] == config.run_steps


def _cost(built: Build, times: measure.Times, name: str) -> dict[str, Any]:
    """The fields of a row about the cost of a pattern."""
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


def _curve(workdir: Path) -> Curve:
    """The training bits per byte of a run, thinned by averaging neighbors."""
    run = folder.load([workdir])[0]
    tokens, _ = run.series("train/bpb")
    parts = np.array_split(np.arange(len(tokens)), min(CURVE_POINTS, len(tokens)))
    thin = lambda values: tuple(round(float(values[part].mean()), 5) for part in parts)
    return Curve(thin(tokens), (thin(run.series("train/bpb")[1]),))


def _together(curves: Sequence[Curve]) -> Curve:
    """Joins curves of one seed each into one curve of all seeds."""
    return Curve(curves[0].tokens, tuple(curve.bits[0] for curve in curves))
