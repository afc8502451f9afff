"""Multi-query associative recall, generated (lm/data/mqar.py): a probe for models trained on it.

A row binds keys to values and asks for every key once. An answer is right if no token is likelier
than its value. Chance is 1 / pairs, guessing among the row's own values; a model that only knows
which ids are values is far below that. Rows are the units of the intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from lm.config import UserError
from lm.data import mqar
from lm.evals import Given, Items, Number, Scored
from lm.evaluation import statistics
from lm.evaluation.scoring import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar:
    """The options of this task, which include a setting of lm/data/mqar.py.

    Attributes:
      length: tokens in a row
      pairs: bindings in a row
      repeats: bindings of a key that another binding of the row also has
      filler: ids at places without a question
      power: spread of the queries: 1 is even, 0.01 (the paper's) puts most of them near the pairs
      rows: number of rows
      seed: seed of the rows
      vocab_size: number of ids in use, whose lower half are keys; 0: those of the tokenizer, which
        may be fewer than the model's
    """

    length: int = 64
    pairs: int = 4
    repeats: int = 0
    filler: Literal["blank", "random"] = "blank"
    power: float = 0.01
    rows: int = 1000
    seed: int = 0
    vocab_size: int = 0
    headline: ClassVar[str] = "accuracy"
    is_better: ClassVar[Literal["higher", "lower"]] = "higher"
    unit: ClassVar[str] = "share of answers"

    def problem(self) -> str | None:
        if self.rows < 1 or self.seed < 0 or self.vocab_size < 0:
            return (
                f"rows={self.rows} must be positive, seed={self.seed} and "
                f"vocab_size={self.vocab_size} not negative"
            )
        # Only `items` knows a tokenizer's vocabulary.
        return self.setting.problem(self.vocab_size or 4 * self.length)

    @property
    def setting(self) -> mqar.Setting:
        names = [field.name for field in dataclasses.fields(mqar.Setting)]
        return mqar.Setting(**{name: getattr(self, name) for name in names})

    def items(self, given: Given) -> Items:
        known = given.data.tokenizer.vocab_size
        if self.vocab_size > known:
            raise UserError(
                f"vocab_size={self.vocab_size} is more than the model's {known}; set vocab_size to "
                "that or less"
            )
        size = self.vocab_size or given.tokenizer.vocab_size
        found = mqar.examples(self.setting, size, self.rows, [self.seed])
        return questions(found)

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        """`accuracy@x`: of answers bound between x and 2 x tokens before. With repeats also
        `accuracy/once` and `accuracy/repeated`: of keys bound once, and more than once.
        """
        examples: mqar.Examples = items.about
        hit = np.stack([one.hit for one in scored])
        asked = examples.targets > 0
        chance = 1 / self.pairs
        found = {
            "accuracy": statistics.share_of_several(
                hit.sum(1), asked.sum(1), chance=chance, keep_units=True
            ),
            "loss": statistics.ratio([one.nll.sum() for one in scored], asked.sum(1)),
        }
        parts = {}
        if self.repeats:
            repeated = asked & examples.is_repeated
            parts = {"once": asked & ~examples.is_repeated, "repeated": repeated}
            parts = {f"accuracy/{name}": part for name, part in parts.items()}
        distance = np.arange(self.length) - examples.last
        bucket = np.frexp(distance)[1]  # 2^(b-1) <= distance < 2^b
        for b in np.unique(bucket[asked]):
            parts[f"accuracy@{2 ** (b - 1)}"] = asked & (bucket == b)
        for name, part in parts.items():
            right = (hit & part).sum(1)
            found[name] = statistics.share_of_several(right, part.sum(1), chance=chance)
        return found


def questions(examples: mqar.Examples) -> Items:
    """The rows to score, and the examples that they were made from."""
    batch = mqar.batch(examples)
    fields = batch.tokens, batch.targets, batch.segment_ids, batch.positions, batch.loss_weights
    return Items([Row(*one) for one in zip(*fields, strict=True)], examples)
