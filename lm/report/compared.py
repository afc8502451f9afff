"""The result of a comparison of patterns (lm/studies/compare.py), as stored in compare.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lm import files
from lm.config import to_mapping
from lm.evaluation.scoring import Cost
from lm.evaluation.statistics import Number
from lm.report import recall


class Difference(NamedTuple):
    """`difference` = pattern - against, mean over seeds, with its 95 % intervals over seeds and
    over items. An interval is None if that source of chance could not be measured.

    For a primary comparison (lm/studies/verdict.py), `sentence` states the verdict, `p` is over
    seeds and corrected, and `outcome` is better, worse, same (no significant difference), none
    (there is no test), at chance or diverged. For other comparisons `outcome` is "", at chance or
    diverged.
    """

    task: str
    pattern: str
    against: str
    unit: str = ""
    difference: float | None = None
    seeds_low: float | None = None
    seeds_high: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    outcome: str = ""
    sentence: str = ""


class SpeedUp(NamedTuple):
    """What the first pattern needs for the same loss, divided by what `pattern` needs
    (lm/studies/speedup.py): in tokens, floating-point operations and seconds. Mean over seeds with
    its 95 % interval, which is None for one seed.
    """

    pattern: str
    tokens: tuple[float, float | None, float | None]
    flops: tuple[float, float | None, float | None]
    seconds: tuple[float, float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The numbers of one run at a task, by name. `cost` is None if it was not kept."""

    numbers: Mapping[str, Number]
    cost: Cost | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task and one pattern's answers, seed by seed. The first three fields are the task's."""

    headline: str
    is_better: Literal["higher", "lower"]
    unit: str
    seeds: tuple[Answer, ...]

    def values(self, name: str) -> np.ndarray:
        """The number of this name for every seed [S]."""
        return np.array([seed.numbers[name].value for seed in self.seeds])

    @property
    def headlines(self) -> np.ndarray:
        """The headline for every seed [S]."""
        return self.values(self.headline)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Training bits per byte [S][n] of every seed over tokens [n]."""

    tokens: tuple[float, ...]
    bits: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A pattern, or a variant. `parameters` exclude the embedding. `seconds` and `peak_bytes` are
    of a train step, None if not known. `decode_seconds` per token and `state_bytes` per row are
    given by tokens in the state. `curve` is None if the row was not trained or no curve was kept.
    `cells`: for each seed, the digest of everything that its training and answers depend on.
    """

    pattern: str
    parameters: int
    ffn_dim: int
    num_layers: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    flops_per_token: float
    decode_seconds: Mapping[int, float]
    state_bytes: Mapping[int, int]
    curve: Curve | None
    tasks: Mapping[str, Asked]
    cells: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`tokens` of each training. `primary`: the comparisons that the study names
    (lm/studies/verdict.py), each with a verdict. `recall_asked`: the digest of the study of recall.
    `facts`: where, when and with what it was made.
    """

    question: str
    seeds: tuple[int, ...]
    tokens: int
    rows: tuple[Row, ...]
    primary: tuple[Mapping[str, str], ...]
    verdicts: tuple[Difference, ...]
    differences: tuple[Difference, ...]
    speed_ups: tuple[SpeedUp, ...]
    recall: tuple[recall.Row, ...]
    recall_asked: str
    facts: Mapping[str, Any]


def load(path: Path) -> Comparison:
    """Reads compare.json.

    Raises:
      UserError: the file is missing, or does not hold a comparison.
    """
    advice = "name the compare.json of a study"
    values = files.read_json(path, advice)
    with files.one_line(f"{path} is damaged", advice):
        found = from_mapping(values)
        _check(found)
    return found


def _check(found: Comparison) -> None:
    """Checks that the parts of a comparison fit each other.

    Raises:
      ValueError: two rows have the same name, rows have other tasks or seeds, or a primary
        comparison is invalid.
    """
    names, num_seeds = [row.pattern for row in found.rows], len(found.seeds)
    if not names or len(set(names)) < len(names) or not num_seeds:
        raise ValueError("it has no rows, no seeds, or two rows of one name")
    for one in found.primary:
        words = [one[key] for key in ("task", "pattern", "against")]
        if len(one) > len(words) or not all(isinstance(word, str) for word in words):
            raise ValueError("a primary comparison is not of a task and two patterns")
    for row in found.rows:
        for label, task in found.rows[0].tasks.items():
            own = row.tasks[label]
            if len(own.seeds) != num_seeds or own.headline != task.headline:
                raise ValueError(f"{row.pattern!r} has other seeds or numbers at {label!r}")
            own.headlines  # noqa: B018 (raises if a seed lacks it)
        if row.cells and len(row.cells) != num_seeds:
            raise ValueError(f"{row.pattern!r} has other cells than seeds")


def from_mapping(values: Mapping[str, Any]) -> Comparison:
    """The inverse of `to_plain`. In a file from before primary comparisons, those are empty."""
    own = {field.name for field in dataclasses.fields(Comparison)} - {"facts"}
    return Comparison(
        question=values["question"],
        seeds=tuple(values["seeds"]),
        tokens=values["tokens"],
        rows=tuple(_row(row) for row in values["rows"]),
        primary=tuple(values.get("primary", ())),
        verdicts=tuple(Difference(**x) for x in values["verdicts"]),
        differences=tuple(Difference(**x) for x in values.get("differences", ())),
        speed_ups=tuple(
            SpeedUp(x["pattern"], *(tuple(x[key]) for key in ("tokens", "flops", "seconds")))
            for x in values.get("speed_ups", ())
        ),
        recall=tuple(recall.rows_of(values["recall"])),
        recall_asked=values.get("recall_asked", ""),
        facts={key: value for key, value in values.items() if key not in own},
    )


def to_plain(found: Comparison) -> dict[str, Any]:
    """Plain values for JSON; None for what is not finite. The sums of every unit are kept for
    headlines only, since for all numbers they would be most of the file.
    """
    return {
        **found.facts,
        "question": found.question,
        "seeds": list(found.seeds),
        "tokens": found.tokens,
        "rows": [_plain_row(row) for row in found.rows],
        "primary": to_mapping(found.primary),
        "verdicts": [x._asdict() for x in found.verdicts],
        "differences": [x._asdict() for x in found.differences],
        "speed_ups": [to_mapping(x._asdict()) for x in found.speed_ups],
        "recall": to_mapping(found.recall),
        "recall_asked": found.recall_asked,
    }


def answer(values: Mapping[str, Any]) -> Answer:
    """An answer from the plain values of `evaluate.to_mapping`."""
    numbers = {name: Number.from_mapping(x) for name, x in values["numbers"].items()}
    return Answer(numbers, Cost(**values["cost"]) if "cost" in values else None)


def curve(values: Mapping[str, Any]) -> Curve:
    """A curve from its plain values."""
    return Curve(_floats(values["tokens"]), tuple(map(_floats, values["bits"])))


def _row(values: Mapping[str, Any]) -> Row:
    by_context = lambda name: {int(context): x for context, x in values[name].items()}
    known = dict(values) | {
        "decode_seconds": by_context("decode_seconds"),
        "state_bytes": by_context("state_bytes"),
        "curve": curve(values["curve"]) if values.get("curve") else None,
        "cells": tuple(values.get("cells", ())),
        "tasks": {
            label: Asked(**{**task, "seeds": tuple(map(answer, task["seeds"]))})
            for label, task in values["tasks"].items()
        },
    }
    return Row(**known)


def _floats(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if x is None else x for x in values)


def _plain_row(row: Row) -> dict[str, Any]:
    plain = {field.name: getattr(row, field.name) for field in dataclasses.fields(Row)}
    plain["decode_seconds"] = {str(context): x for context, x in row.decode_seconds.items()}
    plain["state_bytes"] = {str(context): x for context, x in row.state_bytes.items()}
    plain["curve"] = {} if row.curve is None else to_mapping(row.curve)
    plain["tasks"] = {
        label: {**vars(task), "seeds": [plain_answer(x, task.headline) for x in task.seeds]}
        for label, task in row.tasks.items()
    }
    return finite(plain)


def plain_answer(found: Answer, headline: str) -> dict[str, Any]:
    """The inverse of `answer`, rounded; the units of the headline only."""
    digits = lambda x: round(x, 6) if isinstance(x, float) else x
    numbers = {
        name: {key: digits(x) for key, x in number.to_mapping(with_units=name == headline).items()}
        for name, number in found.numbers.items()
    }
    return {"numbers": numbers} | ({"cost": vars(found.cost)} if found.cost else {})


def finite(value: Any) -> Any:
    """Plain values in which what is not finite is None."""
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
