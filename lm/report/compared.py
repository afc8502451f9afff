"""What a comparison of patterns found (lm/studies/compare.py), as compare.json holds it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.config import UserError, to_mapping
from lm.evaluation.scoring import Cost
from lm.evaluation.statistics import Number
from lm.report import recall


class Verdict(NamedTuple):
    """`difference` = pattern - against. `low`, `high` over items, `p` over seeds (corrected); None
    where that source of chance could not be measured. `outcome`: better, worse, same (no
    significant difference), none (at chance) or diverged.
    """

    task: str
    pattern: str
    against: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    outcome: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one run answered to a task: its numbers by name. `cost` None: it was not kept."""

    numbers: Mapping[str, Number]
    cost: Cost | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task as one pattern answered it, seed by seed. The first three are those of the task."""

    headline: str
    is_better: Literal["higher", "lower"]
    unit: str
    seeds: tuple[Answer, ...]

    def values(self, name: str) -> np.ndarray:
        """A number by its name, of every seed [S]."""
        return np.array([seed.numbers[name].value for seed in self.seeds])

    @property
    def headlines(self) -> np.ndarray:
        """[S]"""
        return self.values(self.headline)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Training bits per byte of every seed [S][n] over tokens [n]."""

    tokens: tuple[float, ...]
    bits: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A pattern, or a variant. `parameters` outside the embedding; `seconds` and `peak_bytes` of a
    train step (None: not known); `decode_seconds` a token and `state_bytes` a row, by tokens in the
    state; `curve` None of what was not trained, or not kept.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`tokens` of each training; `facts`: where, when and with what it was made."""

    question: str
    seeds: tuple[int, ...]
    tokens: int
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    recall: tuple[recall.Row, ...]
    facts: Mapping[str, Any]


def load(path: Path) -> Comparison:
    """From compare.json.

    Raises:
      UserError: it is missing or is not of a comparison.
    """
    try:
        return from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the compare.json of a study") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged; name the compare.json of a study") from None


def from_mapping(values: Mapping[str, Any]) -> Comparison:
    """The inverse of `to_plain`."""
    own = {field.name for field in dataclasses.fields(Comparison)} - {"facts"}
    return Comparison(
        question=values["question"],
        seeds=tuple(values["seeds"]),
        tokens=values["tokens"],
        rows=tuple(_row(row) for row in values["rows"]),
        verdicts=tuple(Verdict(**verdict) for verdict in values["verdicts"]),
        recall=tuple(recall.rows_of(values["recall"])),
        facts={key: value for key, value in values.items() if key not in own},
    )


def to_plain(found: Comparison) -> dict[str, Any]:
    """Plain values for JSON, which has no word for what is not finite: None. Without the sums of
    every unit, which would be most of the file.
    """
    return {
        **found.facts,
        "question": found.question,
        "seeds": list(found.seeds),
        "tokens": found.tokens,
        "rows": [_plain_row(row) for row in found.rows],
        "verdicts": [verdict._asdict() for verdict in found.verdicts],
        "recall": to_mapping(found.recall),
    }


def answer(values: Mapping[str, Any]) -> Answer:
    """From the plain values of `evaluate.to_mapping`."""
    numbers = {name: Number.from_mapping(x) for name, x in values["numbers"].items()}
    return Answer(numbers, Cost(**values["cost"]) if "cost" in values else None)


def _row(values: Mapping[str, Any]) -> Row:
    curve = values.get("curve")
    by_context = lambda name: {int(context): x for context, x in values[name].items()}
    known = dict(values) | {
        "decode_seconds": by_context("decode_seconds"),
        "state_bytes": by_context("state_bytes"),
        "curve": Curve(_floats(curve["tokens"]), tuple(map(_floats, curve["bits"])))
        if curve
        else None,
        "tasks": {
            label: Asked(**{**task, "seeds": tuple(map(answer, task["seeds"]))})
            for label, task in values["tasks"].items()
        },
    }
    return Row(**known)


def _floats(values: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if x is None else x for x in values)


def _plain_row(row: Row) -> dict[str, Any]:
    plain = {field.name: getattr(row, field.name) for field in dataclasses.fields(Row)}
    plain["decode_seconds"] = {str(context): x for context, x in row.decode_seconds.items()}
    plain["state_bytes"] = {str(context): x for context, x in row.state_bytes.items()}
    plain["curve"] = {} if row.curve is None else to_mapping(row.curve)
    plain["tasks"] = {
        label: {**vars(task), "seeds": [_plain_answer(seed) for seed in task.seeds]}
        for label, task in row.tasks.items()
    }
    return _finite(plain)


def _plain_answer(found: Answer) -> dict[str, Any]:
    digits = lambda x: round(x, 6) if isinstance(x, float) else x
    numbers = {
        name: {key: digits(x) for key, x in number.to_mapping().items()}
        for name, number in found.numbers.items()
    }
    return {"numbers": numbers} | ({"cost": vars(found.cost)} if found.cost else {})


def _finite(value: Any) -> Any:
    """With None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
