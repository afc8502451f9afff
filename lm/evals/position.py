"""Loss by position in the document, in buckets [0, 1), [1, 2), [2, 4), [4, 8), ...: on a
logarithmic axis this shows how much context helps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from lm.evals import Given, Items, Number, Scored
from lm.evals.bits_per_byte import held_out
from lm.evaluation import statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The options of this task.

    Attributes:
      max_tokens: tokens scored in each validation set; 0: the run's evaluate.max_tokens
    """

    max_tokens: int = 0
    headline: ClassVar[str] = "loss"
    unit: ClassVar[str] = "nats per token"
    is_better: ClassVar[Literal["higher", "lower"]] = "lower"

    def problem(self) -> str | None:
        return f"max_tokens={self.max_tokens} must be >= 0" if self.max_tokens < 0 else None

    def items(self, given: Given) -> Items:
        return held_out(given, self.max_tokens or given.max_tokens)

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        """`loss@x`: positions from x up to 2 x - 1; for x = 0, position 0."""
        documents = np.concatenate(items.about["documents"])
        # Documents of different sets have the same numbers, so rows are told apart by their set.
        sets = items.about["sets"].values()
        offsets = [
            np.full(len(items.rows[i].tokens), s) for s, set_ in enumerate(sets) for i in set_
        ]
        unit = documents + (np.max(documents, initial=0) + 1) * np.concatenate(offsets)
        weights = np.concatenate([row.weights for row in items.rows]).astype(np.float64)
        nll = np.concatenate([one.nll for one in scored]).astype(np.float64) * weights
        bucket = np.frexp(np.concatenate([row.positions for row in items.rows]))[1]
        found = {"loss": _ratio(nll, weights, unit, weights > 0)}
        for b in range(int(bucket[weights > 0].max(initial=-1)) + 1):
            chosen = (weights > 0) & (bucket == b)
            if chosen.any():
                found[f"loss@{2**b // 2}"] = _ratio(nll, weights, unit, chosen)
        return found


def _ratio(nll: np.ndarray, weights: np.ndarray, unit: np.ndarray, chosen: np.ndarray) -> Number:
    _, index = np.unique(unit[chosen], return_inverse=True)
    sums = (np.bincount(index, values[chosen]) for values in (nll, weights))
    return statistics.ratio(*sums)
