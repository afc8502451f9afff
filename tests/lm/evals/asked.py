"""Request files and stand-in models for the tests of the tasks that score continuations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.evals import Items
from lm.evaluation.scoring import Row, Scored

BARE = 1_000_000


def write(path: Path, records: Iterable[Any]) -> str:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


def request(doc_id: int, idx: int, context: str, continuation: str, label: Any) -> dict[str, Any]:
    asked = {"context": context, "continuation": continuation}
    return {"request_type": "x", "request": asked, "doc_id": doc_id, "idx": idx, "label": label}


def questions(
    num: int, choices: Sequence[int] = (4,), seed: int = 0, bare: bool = False
) -> list[dict[str, Any]]:
    """Documents of random letters. The right answer is at a random place; the number of choices
    cycles.
    """
    rng = np.random.default_rng(seed)
    word = lambda low, high: "".join(rng.choice(list("abcdefgh"), rng.integers(low, high)))
    found, twins = [], []
    for i in range(num):
        k = choices[i % len(choices)]
        question, label = f"Question: {word(5, 20)}\nAnswer:", int(rng.integers(k))
        for idx in range(k):
            answer = f" {word(3, 12)}"
            found.append(request(i, idx, question, answer, label))
            twins.append(request(BARE + i, idx, "Answer:", answer, label))
    return found + twins * bare


def constant(rows: Sequence[Row], nats: float = 1.0) -> list[Scored]:
    """Every token has the same loss, and none is the likeliest."""
    return totals(rows, [nats * row.weights.sum() for row in rows])


def totals(rows: Sequence[Row], nats: Sequence[float] | np.ndarray) -> list[Scored]:
    """Row i costs nats[i] in total, spread evenly over its tokens."""
    shares = [total / row.weights.sum() for row, total in zip(rows, nats, strict=True)]
    return [
        Scored((row.weights * share).astype(np.float32), np.zeros(len(row.tokens), bool))
        for row, share in zip(rows, shares, strict=True)
    ]


def favorite(items: Items, chosen: Iterable[int]) -> list[Scored]:
    """Every token of the rows `chosen` is likely; all other tokens are not."""
    chosen = set(chosen)
    likely = [np.float32(0.01 if i in chosen else 9.0) for i in range(len(items.rows))]
    return [
        Scored(row.weights * nats, (row.weights > 0) & (nats < 1))
        for row, nats in zip(items.rows, likely, strict=True)
    ]
