"""Bits per byte and loss of every validation set of the run.

    bpb  = sum(nll) / (ln 2 * sum(bytes))    over targets that have bytes
    loss = sum(nll) / number of targets      nats per token, end of text included

Each token is scored once. The interval is over documents; a long one covers many rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from lm.config import DataConfig, UserError
from lm.data import loader
from lm.data.batch import byte_weights
from lm.evals import Given, Items, Number, Scored
from lm.evaluation import statistics
from lm.evaluation.scoring import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """The options of this task.

    Attributes:
      max_tokens: tokens scored in each validation set; 0: the run's evaluate.max_tokens
    """

    max_tokens: int = 0
    headline: ClassVar[str] = "bpb"
    unit: ClassVar[str] = "bits per byte"
    is_better: ClassVar[Literal["higher", "lower"]] = "lower"

    def problem(self) -> str | None:
        return f"max_tokens={self.max_tokens} must be >= 0" if self.max_tokens < 0 else None

    def items(self, given: Given) -> Items:
        return held_out(given, self.max_tokens or given.max_tokens)

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        found: dict[str, Number] = {}
        sets = items.about["sets"].items()
        tables = {name: _by_document(items, scored, chosen) for name, chosen in sets}
        for name, table in tables.items():
            found[f"bpb/{name}"] = statistics.ratio(table[2] / math.log(2), table[3])
            found[f"loss/{name}"] = statistics.ratio(table[0], table[1])
        # All sets together; documents of different sets are different units.
        whole = np.concatenate(list(tables.values()), axis=1) if tables else np.zeros((4, 0))
        bits = whole[2] / math.log(2)
        return {"bpb": statistics.ratio(bits, whole[3], keep_units=True)} | found


def held_out(given: Given, max_tokens: int) -> Items:
    """The validation rows of every source. `about`: "sets" maps names to row indices. For each row,
    "documents" [n] has its documents, -1 for padding, and "num_bytes" [n] the bytes of its targets.

    Raises:
      UserError: no source holds out text.
    """
    if not has_sets(given.data):
        raise UserError(
            "no source of data has a valid_fraction above 0, so there are no validation sets; set "
            "data.sources.*.valid_fraction (espalier evaluate: --source=NAME:PATH adds a set)"
        )
    about: dict[str, Any] = {"sets": {}, "documents": [], "num_bytes": []}
    rows: list[Row] = []
    token_bytes = given.tokenizer.token_bytes
    for name, found in loader.validation_rows(given.prepared, given.data, max_tokens).items():
        about["sets"][name] = range(len(rows), len(rows) + len(found))
        for i in range(len(found)):
            batch = found[i]
            rows.append(
                Row(
                    batch.tokens,
                    batch.targets,
                    batch.segment_ids,
                    batch.positions,
                    batch.loss_weights,
                )
            )
            about["documents"].append(found.documents(i))
            about["num_bytes"].append(byte_weights(batch, token_bytes)[1])
    return Items(rows, about)


def has_sets(data: DataConfig) -> bool:
    """Whether any source holds out text."""
    return any(source.valid_fraction > 0 for source in data.sources.values())


def _by_document(items: Items, scored: Sequence[Scored], chosen: Sequence[int]) -> np.ndarray:
    """[4, documents]: nats, targets, nats of targets that have bytes, bytes."""
    join = lambda values: np.concatenate([values[i] for i in chosen])
    documents, num_bytes = join(items.about["documents"]), join(items.about["num_bytes"])
    weights = np.concatenate([items.rows[i].weights for i in chosen]).astype(np.float64)
    nll = np.concatenate([scored[i].nll for i in chosen]).astype(np.float64) * weights
    columns = np.stack([nll, weights, nll * (num_bytes > 0), num_bytes])
    units, index = np.unique(documents[weights > 0], return_inverse=True)
    columns = columns[:, weights > 0]
    return np.stack([np.bincount(index, row, minlength=len(units)) for row in columns])
