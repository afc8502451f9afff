"""Recall against the size of the state: multi-query associative recall, learned by each mixer.

    for every problem, pattern, width: for every learning rate: for every seed:
        train on generated rows until every test setting is solved or the steps are used up
    -> a cell of the grid (lm/studies/grid.py), POINT/ with its run -> recall.json, .md, .svg

The question and the grid are those of Zoology (Arora et al. 2023, arXiv 2312.04927, fig. 2): small
models without a feed-forward, a width and a state that vary, and the best of several learning rates
by the test accuracy itself. Once a rate is solved for every seed, later rates are not trained: they
could only add what is missing to an accuracy of 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import files, metrics, train
from lm import layers as layer_lib
from lm.config import Config, RunValues, UserError, convert, from_mapping, to_mapping
from lm.data import mqar
from lm.mapping import lasting
from lm.report import recall as recall_page
from lm.report.figures import standalone
from lm.report.recall import Row
from lm.studies import grid, measure
from lm.studies.grid import Entry, Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is learned. A batch is from one training set; sets are repeated in epochs.

    Attributes:
      train: training sets
      test: test sets
      batch_size: rows of a batch
      steps: most steps of a training
      evaluate_every: steps between two evaluations
    """

    train: tuple[mqar.Set, ...]
    test: tuple[mqar.Set, ...]
    batch_size: int
    steps: int
    evaluate_every: int

    @property
    def longest_test(self) -> int:
        return max(one.setting.length for one in self.test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study of recall.

    Attributes:
      run: a whole configuration without sources; the study replaces its pattern, width, head_dim =
        width / num_heads, learning rate, seed, batch sizes, length and evaluation
      problems: name -> what is learned
      patterns: the patterns that are compared
      widths: widths of the models
      learning_rates: peak rates, of which the best counts
      seeds: seeds of the trainings
      solved: a training ends when it reaches this accuracy at every test setting
    """

    run: RunValues
    problems: Mapping[str, Problem]
    patterns: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    solved: float


class Point(NamedTuple):
    """One training, which is a cell of the grid."""

    problem: str
    pattern: str
    width: int
    learning_rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a training: `accuracy` by test setting; `seconds` of the launch that ended it,
    with compilation.
    """

    accuracy: Mapping[str, float]
    steps: int
    skipped: int
    seconds: float
    parameters: int
    state_bytes: int


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, an empty list, a setting that does not fit its length or
      the vocabulary, or a run that is refused.
    """
    study: Study = convert(Study, mapping, "config")
    for name in ("problems", "patterns", "widths", "learning_rates", "seeds"):
        values = getattr(study, name)
        if not values:
            raise UserError(f"config.{name} is empty; name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{name}={values} names one twice; name each once")
    if not 0 < study.solved <= 1:
        raise UserError(f"config.solved={study.solved} must lie in (0, 1]; at 1 nothing is missed")
    for label, problem in study.problems.items():
        _check(problem, f"config.problems.{label}")
    grid.check_names(points(study))
    first = points(study)[0]
    for point in points(study):  # checks layers separately, and all else with the first of them
        if point[1:3] != first[1:3] and point != (first[0], *point[1:3], *first[3:]):
            continue
        config = configuration(study, point)
        layer_lib.check(config.model)
        problem = study.problems[point.problem]
        for rows in (*problem.train, *problem.test):
            if (reason := rows.setting.problem(config.data.tokenizer.vocab_size)) is not None:
                raise UserError(f"config.problems.{point.problem}: {reason}")
    return study


def _check(problem: Problem, where: str) -> None:
    for name in ("train", "test"):
        if not getattr(problem, name):
            raise UserError(f"{where}.{name} is empty; give at least one setting")
    for name in ("batch_size", "steps", "evaluate_every"):
        if getattr(problem, name) < 1:
            raise UserError(f"{where}.{name}={getattr(problem, name)} must be at least 1")
    names = [label(rows.setting) for rows in problem.test]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}.test has {twice[0]} twice; keep one")
    for rows in problem.train:
        if rows.examples < problem.batch_size:
            raise UserError(
                f"{where}: examples={rows.examples} make no batch of {problem.batch_size}; "
                "set batch_size to that or less"
            )
    if any(rows.examples < 1 for rows in problem.test):
        raise UserError(f"{where}.test: examples must be at least 1")


def label(setting: mqar.Setting) -> str:
    """The label of the task that asks a test setting; labels of tasks have no dots."""
    return setting.name.replace(".", "_")


def points(study: Study) -> list[Point]:
    """Everything that may be trained, in this order."""
    axes = study.problems, study.patterns, study.widths, study.learning_rates, study.seeds
    return [Point(*values) for values in itertools.product(*axes)]


def configuration(study: Study, point: Point) -> Config:
    """The run of a point.

    Raises:
      UserError: a width that num_heads does not divide, or a run that is refused.
    """
    values: Any = to_mapping(dict(study.run))
    problem, heads = study.problems[point.problem], values["model"]["num_heads"]
    if point.width % heads:
        raise UserError(f"config.widths: {point.width} is not a multiple of num_heads={heads}")
    if values["data"]["sources"]:
        raise UserError("config.run.data.sources: the rows are generated; set it to {}")
    sizes = {"width": point.width, "head_dim": point.width // heads, "pattern": point.pattern}
    length = max(rows.setting.length for rows in problem.train)
    tasks = _tasks(problem, values["data"]["tokenizer"]["vocab_size"])
    values["seed"] = point.seed
    values["model"] |= sizes
    values["data"] |= {"context_length": length, "batch_size": problem.batch_size}
    values["schedule"]["peak_learning_rate"] = point.learning_rate
    values["run"]["length"] = f"{problem.steps} steps"
    values["evaluate"] |= {"every": f"{problem.evaluate_every} steps", "tasks": tasks}
    return from_mapping(values)


def _tasks(problem: Problem, vocab_size: int) -> dict[str, dict[str, Any]]:
    """Label -> the task of a test setting; its rows are the same for every seed of the study."""
    return {
        label(one.setting): {
            "task": "mqar",
            **dataclasses.asdict(one.setting),
            "rows": one.examples,
            "seed": i,
            "vocab_size": vocab_size,
        }
        for i, one in enumerate(problem.test)
    }


def training_rows(study: Study, config: Config, point: Point) -> mqar.Epochs:
    """The rows that a point is trained on."""
    problem = study.problems[point.problem]
    return mqar.Epochs(
        sets=problem.train,
        vocab_size=config.data.tokenizer.vocab_size,
        batch_size=problem.batch_size,
        seed=point.seed,
    )


def create_grid(study: Study, workdir: Path, table: Sequence[Entry[Outcome]]) -> Grid[Any, Any]:
    """The grid of trainings; `table` are those finished elsewhere."""
    asked = {
        point: {
            "solved": study.solved,
            "problem": study.problems[point.problem],
            "run": lasting(configuration(study, point)),
        }
        for point in points(study)
    }
    return Grid(folder=workdir / "points", outcome=Outcome, asked=asked, table=table)


def run(study: Study, trainings: Grid[Point, Outcome]) -> dict[Point, Outcome] | None:
    """Every training that is needed, from the folder, the table, or by training; None if a signal
    stopped it.

    Raises:
      UserError: the folder holds points of another configuration, or training reports a mistake.
    """
    return grid.run(
        trainings, functools.partial(train_point, study), functools.partial(left, study)
    )


def left(study: Study, found: Mapping[Point, Outcome]) -> list[Point]:
    """What to train next: for each problem, pattern and width, the seeds that are missing at its
    current learning rate.
    """
    wanted = []
    for at in _combinations(study):
        for rate in study.learning_rates:
            seeds = [Point(*at, rate, seed) for seed in study.seeds]
            if lacking := [point for point in seeds if point not in found]:
                wanted += lacking
                break
            if _is_solved(study, [found[point] for point in seeds]):
                break
    return wanted


def _combinations(study: Study) -> Iterable[tuple[str, str, int]]:
    return itertools.product(study.problems, study.patterns, study.widths)


def _is_solved(study: Study, outcomes: Sequence[Outcome]) -> bool:
    return all(min(one.accuracy.values()) >= study.solved for one in outcomes)


def rows(study: Study, found: Mapping[Point, Outcome]) -> list[Row]:
    """The best learning rate of every problem, pattern and width, once `run` has found them all."""
    return [_row(study, found, at) for at in _combinations(study)]


def _row(study: Study, found: Mapping[Point, Outcome], at: tuple[str, str, int]) -> Row:
    by_rate: dict[float, list[Outcome]] = {}
    for rate in study.learning_rates:
        by_rate[rate] = [found[Point(*at, rate, seed)] for seed in study.seeds]
        if _is_solved(study, by_rate[rate]):
            break  # rates after this one may be there, from a bigger study; they do not count

    def score(rate: float) -> float:
        return float(np.mean([list(one.accuracy.values()) for one in by_rate[rate]]))

    rate = max(by_rate, key=score)
    best, trained = by_rate[rate], list(itertools.chain(*by_rate.values()))
    by_seed = {name: tuple(one.accuracy[name] for one in best) for name in best[0].accuracy}
    return Row(
        *at,
        learning_rate=rate,
        accuracy={name: float(np.mean(values)) for name, values in by_seed.items()},
        by_seed=by_seed,
        steps=tuple(one.steps for one in best),
        num_trained=len(trained),
        state_bytes=best[0].state_bytes,
        parameters=best[0].parameters,
        seconds=sum(one.seconds for one in trained),
    )


def train_point(study: Study, point: Point, workdir: Path) -> Outcome | None:
    """Trains one point until its steps are used up or it is solved; None if a signal stopped
    it.
    """
    start, problem = time.perf_counter(), study.problems[point.problem]
    config = configuration(study, point)
    options = train.Options(
        workdir=workdir,
        data_dir=workdir,
        rows=training_rows(study, config, point),
        until={label(one.setting): study.solved for one in problem.test},
    )
    done = train.run(config, options)
    if not done.finished:
        return None
    last = metrics.read(workdir)[-1]
    return Outcome(
        accuracy={
            one.setting.name: last[f"task/{label(one.setting)}/accuracy"] for one in problem.test
        },
        steps=last["step"],
        skipped=int(last["optim/skipped_total"]),
        seconds=time.perf_counter() - start,
        parameters=measure.parameters(done.build),
        state_bytes=measure.state_bytes(done.build.model, problem.longest_test),
    )


def write(
    rows: Sequence[Row], cells: Sequence[Mapping[str, Any]], head: Mapping[str, Any], workdir: Path
) -> None:
    """Writes recall.json, recall.md and recall.svg to the workdir. `cells` is the result of
    `grid.entries`.
    """
    values = {**head, "recall": to_mapping(rows), "cells": list(cells)}
    files.replace(workdir / "recall.json", json.dumps(values, indent=1) + "\n")
    files.replace(workdir / "recall.md", recall_page.table(rows))
    files.replace(workdir / "recall.svg", standalone(recall_page.figure(rows)))
