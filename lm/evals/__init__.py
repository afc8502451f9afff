"""Tasks: what a model is evaluated on, one file per task, found by listing this folder.

    items(given)            text, files, a generator -> rows to score and what is known of them
    scorer(items.rows)      the only step that sees the model (lm/evaluation/scoring.py)
    numbers(items, scored)  -> {name: Number}, each with its interval

A task is a frozen dataclass, named like its file in camel case, whose fields with defaults are its
options. Its numbers are named by words; a point of a curve is named `word@x` with a number x.
`headline` is the number that stands for the task where there is room for only one.
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
    """What a task may read: the run's tokenizer, its configuration of data, the prepared data, and
    `max_tokens` of each validation set. A file that only the task reads is named in its options.
    """

    tokenizer: Tokenizer
    prepared: Prepared
    data: DataConfig
    max_tokens: int


class Items(NamedTuple):
    """`about` belongs to the task: labels, units, whatever `numbers` needs besides the scores."""

    rows: list[Row]
    about: Any


class Task(Protocol):
    """One task. `headline`: the name of one of its `numbers`. `is_better`: whether higher or lower
    is better. `unit`: the unit of the headline, in words.
    """

    headline: ClassVar[str]
    is_better: ClassVar[typing.Literal["higher", "lower"]]
    unit: ClassVar[str]

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; called before any device is touched."""
        ...

    def items(self, given: Given) -> Items:
        """The rows to score.

        Raises:
          UserError: a file is missing, empty or damaged, or a row exceeds the limit.
        """
        ...

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        """The numbers of the task. `scored[i]` belongs to `items.rows[i]`."""
        ...


def create(tasks: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Task]:
    """label -> {"task": name, **options} becomes label -> task. A label that is the name of a task
    needs no "task". `where` names the mapping in messages.

    Raises:
      UserError: a task or option is unknown, a value has the wrong type, or options contradict each
      other.
    """
    for label in tasks:
        if not re.fullmatch(r"[\w-]+", label):
            raise UserError(f"{where}.{label}: a label takes letters, digits, _ and -; rename it")
    return {
        label: TASKS.create({"task": label, **options}, f"{where}.{label}")
        for label, options in tasks.items()
    }
