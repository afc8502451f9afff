"""Evaluates tasks on one model: prepared items, their scores, numbers with intervals, and the cost.

tasks -> items -> scorer -> numbers -> {label: Result} -> evaluation JSON, tables
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from lm.config import Config, DataConfig, Duration, UserError
from lm.evals import Given, Items, Task, bits_per_byte
from lm.evals.bits_per_byte import BitsPerByte
from lm.evaluation.scoring import Cost, Scorer
from lm.evaluation.statistics import Number
from lm.parallel import processes

log = logging.getLogger(__name__)

ALWAYS = ""  # the label of the task in `always`; a configuration cannot use this label


def always(data: DataConfig) -> dict[str, Task]:
    """The task that every run with held-out text has."""
    return {ALWAYS: BitsPerByte()} if bits_per_byte.has_sets(data) else {}


class Result(NamedTuple):
    """The numbers of a task by name, and what scoring them cost."""

    numbers: dict[str, Number]
    cost: Cost


class Stopped(Exception):  # noqa: N818 (not an error: the user asked)
    """The user asked to stop; raised between two batches."""


class Prepared(NamedTuple):
    """A task and its rows, which do not change while a model trains."""

    task: Task
    items: Items


def prepare(tasks: Mapping[str, Task], given: Given) -> dict[str, Prepared]:
    """Reads the items of every task.

    Raises:
      UserError: a task's file is missing, empty or damaged, or a row exceeds the limit; the message
      names the label.
    """
    return {label: Prepared(task, _items(label, task, given)) for label, task in tasks.items()}


def _items(label: str, task: Task, given: Given) -> Items:
    try:
        return task.items(given)
    except UserError as error:
        raise UserError(f"task {label or 'bits_per_byte'}: {error}") from error


def run(
    prepared: Mapping[str, Prepared],
    scorer: Scorer,
    stop: Callable[[], bool] = lambda: False,
    advance: Callable[[str, int], object] = lambda label, tokens: None,
) -> dict[str, Result]:
    """The result of every task. `stop()` is called after each batch; `advance(label, tokens)`
    reports progress.

    Raises:
      Stopped: `stop()` became true.
    """
    found = {}
    for label, (task, items) in prepared.items():
        before = scorer.cost

        def report(tokens: int, label: str = label) -> None:
            advance(label, tokens)
            if stop():
                raise Stopped

        scored = scorer(items.rows, report)
        cost = Cost(
            scorer.cost.tokens - before.tokens,
            scorer.cost.flops - before.flops,
            scorer.cost.seconds - before.seconds,
        )
        found[label] = Result(task.numbers(items, scored), cost)
    return found


def to_record(results: Mapping[str, Result]) -> dict[str, float]:
    """The values under the names they have in metrics.jsonl: eval/SET/bpb and eval/SET/loss for the
    task that every run has, task/LABEL/NAME for the others.
    """
    found = {}
    for label, result in results.items():
        for name, number in result.numbers.items():
            unit, _, source = name.partition("/")
            if label != ALWAYS:
                found[f"task/{label}/{name}"] = number.value
            elif source:
                found[f"eval/{source}/{unit}"] = number.value
    return found


def is_enough(
    until: Mapping[str, float], tasks: Mapping[str, Task], record: Mapping[str, Any]
) -> bool:
    """Whether a record made by `to_record` reaches the goal: the headline of every task in `until`
    (label -> value) is at least as good as its value. False if `until` is empty.
    """

    def is_good(label: str, value: float) -> bool:
        task = tasks[label]
        found = record.get(f"task/{label}/{task.headline}")
        if found is None:
            return False
        return found >= value if task.is_better == "higher" else found <= value

    return bool(until) and all(is_good(label, value) for label, value in until.items())


def num_tokens(prepared: Prepared) -> int:
    """The sum of the tokens that `run` passes to `advance`."""
    return sum(len(row.tokens) for row in prepared.items.rows)


def spaced(config: Config, prepared: Mapping[str, Prepared], run_tokens: float) -> Duration:
    """How often a run that ends at `run_tokens` is evaluated. This is `evaluate.every`, or if that
    is in percent the least multiple of it that keeps to `evaluate.share`. Scoring a token costs a
    third of training on it, since the backward pass costs twice a forward pass.
    """
    every, share = config.evaluate.every, config.evaluate.share
    if every.unit != "percent" or not (every.value and share):
        return every
    scored = sum(map(num_tokens, prepared.values()))
    span = every.tokens(run_tokens=run_tokens, tokens_per_step=config.tokens_per_step)
    found = Duration(max(1, math.ceil(scored / (3 * share * span))) * every.value, "percent")
    if found != every and processes.is_first():
        log.warning(
            "evaluated %s, not every %s: more evaluations of %s tokens would take over "
            "evaluate.share=%g of the training; set evaluate.share=0 for all of them",
            "at the end" if found.value >= 100 else f"every {found}",
            *(every, f"{scored:,}", share),
        )
    return found


def to_mapping(results: Mapping[str, Result], *, with_units: bool = False) -> dict[str, Any]:
    """Plain values for JSON: label -> {"numbers": {name: ...}, "cost": ...}. `with_units` adds the
    sums of every unit, so that models can be compared unit by unit.
    """
    return {
        label: {
            "numbers": {
                name: number.to_mapping(with_units=with_units)
                for name, number in result.numbers.items()
            },
            "cost": dataclasses.asdict(result.cost),
        }
        for label, result in results.items()
    }


def tables(results: Mapping[str, Result]) -> list[Table]:
    """Tables for people: for each task one of its numbers, one for every curve, and its cost."""
    found = []
    for label, (numbers, cost) in results.items():
        words = {name: x for name, x in numbers.items() if "@" not in name}
        found.append(_table([label, "value", "95 % interval", "units", ""], _rows(words)))
        curves = {name.partition("@")[0]: {} for name in numbers if "@" in name}
        for name, number in numbers.items():
            word, _, place = name.partition("@")
            if place:
                curves[word][f"{float(place):,g}"] = number
        for word, points in curves.items():
            found.append(
                _table([f"{word} at", "value", "95 % interval", "units", ""], _rows(points))
            )
        note = f"{cost.tokens:,} tokens, {cost.flops:.3g} FLOPs, {cost.seconds:.1f} s"
        found.append(_table([note], []))
    return found


def _rows(numbers: Mapping[str, Number]) -> list[list[str]]:
    return [
        [
            name,
            f"{x.value:.4f}",
            x.interval(".4f"),
            f"{x.num:,}",
            "at chance" if x.is_at_chance else "",
        ]
        for name, x in numbers.items()
    ]


def _table(head: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if 0 < i < 4 else "left")
    for row in rows:
        table.add_row(*row)
    return table
