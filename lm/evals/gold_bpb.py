"""Bits per byte of the right answer. It falls smoothly with model size even while the share of
right answers is still at chance. lm/evals/_requests.py describes the files: HumanEval, GSM8K,
LAMBADA and others as requests. If there are several choices, the right one is scored.

    bpb  = sum(nll) / (ln 2 * sum(bytes))    over the answers of all documents
    loss = sum(nll) / number of tokens       nats

The interval is over documents. Bhagia et al. 2024 (arXiv 2412.04403) use it for small models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from lm.evals import Given, Items, Number, Scored, _json_lines, _requests
from lm.evaluation import statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldBpb(_requests.Asked):
    """The options of this task, in addition to those of `Asked`.

    Attributes:
      labels: PIQA's file of labels
    """

    labels: str = ""
    headline: ClassVar[str] = "bpb"
    unit: ClassVar[str] = "bits per byte"
    is_better: ClassVar[Literal["higher", "lower"]] = "lower"

    def items(self, given: Given) -> Items:
        documents = _requests.documents(self.path, self.labels)
        chosen = _json_lines.spread(documents, self.max_items)
        rows = self.rows([document.choices[document.gold] for document in chosen], given)
        return Items(rows, _requests.num_bytes(rows, given.tokenizer))

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        nats = -_requests.logprobs(scored)
        tokens = np.array([np.count_nonzero(row.weights) for row in items.rows])
        return {
            "bpb": statistics.ratio(nats / math.log(2), items.about, keep_units=True),
            "loss": statistics.ratio(nats, tokens),
        }
