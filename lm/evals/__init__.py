"""Tasks: what is asked of a model, one file each, found by listing this folder.

    items(given)            text, files, a generator -> rows to score and what is known of them
    scorer(items.rows)      the only step that sees the model (lm/evaluation/scoring.py)
    numbers(items, scored)  -> {name: Number}, each with its interval

A task is a frozen dataclass, named as its file in camel case, whose fields with defaults are its
options. The names of its numbers are words; of a curve, `word@x` with a number x. `headline` is the
number that stands for the task where there is room for one.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from lm.config import DataConfig, UserError
from lm.data.prepare import Prepared
from lm.data.tokenizers import Tokenizer
from lm.evaluation.scoring import Row, Scored
from lm.evaluation.statistics import Number
from lm.families import TASKS

__all__ = ["Given", "Items", "Number", "Row", "Scored", "Task", "create"]


class Given(NamedTuple):
    """What a task may read: the run's tokenizer, its data, prepared, and `max_tokens` of each
    validation set. A task's own file comes from its options.
    """

    tokenizer: Tokenizer
    prepared: Prepared
    data: DataConfig
    max_tokens: int


class Items(NamedTuple):
    """`about` is the task's own: labels, units, whatever `numbers` needs beside the scores."""

    rows: list[Row]
    about: Any


class Task(Protocol):
    """One question. `headline`: a name of `numbers`; `is_better`: which way it should go; `unit`:
    what it counts, in words.
    """

    headline: ClassVar[str]
    is_better: ClassVar[typing.Literal["higher", "lower"]]
    unit: ClassVar[str]

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        ...

    def items(self, given: Given) -> Items:
        """The rows to score.

        Raises:
          UserError: a file that is missing, empty or damaged; a row over the limit.
        """
        ...

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        """`scored[i]` is of `items.rows[i]`."""
        ...


def create(tasks: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Task]:
    """label -> {"task": name, **options} -> the tasks; a label that is a task's name needs no
    "task". `where` names the mapping in mistakes.

    Raises:
      UserError: an unknown task or option, a value of another type, options that contradict.
    """
    for label in tasks:
        if not re.fullmatch(r"[\w-]+", label):
            raise UserError(f"{where}.{label}: a label takes letters, digits, _ and -; rename it")
    return {
        label: TASKS.create({"task": label, **options}, f"{where}.{label}")
        for label, options in tasks.items()
    }
