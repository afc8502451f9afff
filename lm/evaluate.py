"""Scores of a model on held-out batches, added up on the host in float64.

    loss = sum(weight * nll) / sum(weight)                 nats per token, end of text included
    bpb  = sum(weight * nll) / (ln 2 * sum(weight * bytes))    over targets that have bytes

The device gives the negative log-likelihood of every token; totals, positions and sources are sums
over the same numbers. Position is the index within the document, in buckets [0, 1), [1, 2), [2, 4),
[4, 8), ...: how much context helps shows on a logarithmic axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from lm.data.batch import Batch, byte_weights


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over tokens. `text_nll` and `num_bytes` leave out what has no bytes: end of text."""

    nll: float = 0.0
    num_tokens: float = 0.0
    text_nll: float = 0.0
    num_bytes: float = 0.0

    @property
    def loss(self) -> float:
        """Nats per token; nan of no tokens."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per UTF-8 byte; nan of no bytes."""
        return self.text_nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def __add__(self, other: Score) -> Score:
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Score(*(a + b for a, b in zip(ours, theirs, strict=True)))

    def to_mapping(self) -> dict[str, float | int | None]:
        """Plain values; None, not nan, where nothing was counted: JSON has no nan."""
        return {
            "loss": self.loss if self.num_tokens else None,
            "bpb": self.bpb if self.num_bytes else None,
            "tokens": round(self.num_tokens),
            "bytes": round(self.num_bytes),
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """`by_position[i]` covers positions [2^(i-1), 2^i), the first one position 0. `by_source` has a
    key per source id seen. `is_complete` False: stopped between two batches.
    """

    total: Score
    by_position: tuple[Score, ...]
    by_source: dict[int, Score]
    is_complete: bool

    @property
    def loss(self) -> float:
        return self.total.loss

    @property
    def bpb(self) -> float:
        return self.total.bpb

    def to_mapping(self, source_names: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON; buckets without tokens are left out."""
        positions = [
            {"first": first, "last": last} | score.to_mapping()
            for (first, last), score in zip(self.position_ranges, self.by_position, strict=True)
            if score.num_tokens
        ]
        sources = {source_names[i]: score.to_mapping() for i, score in self.by_source.items()}
        return self.total.to_mapping() | {"by_position": positions, "by_source": sources}

    @property
    def position_ranges(self) -> list[tuple[int, int]]:
        """First and last position of each bucket."""
        return [(2**i // 2, 2**i - 1) for i in range(len(self.by_position))]


def evaluate(
    token_nll: Callable[[Any, Batch], jax.Array],
    put: Callable[[Batch], Batch],
    params: Any,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Scores `batches` (of numpy arrays). `token_nll(params, batch)` is `Build.token_nll`, `put`
    places a batch on the mesh, `token_bytes[id]` counts UTF-8 bytes. `stop()` is asked before each
    batch; once true, the report covers what was done.
    """
    positions: list[Score] = []
    sources: list[Score] = []
    is_complete = True
    pending: tuple[Batch, jax.Array] | None = None
    for batch in batches:
        if stop():
            is_complete = False
            break
        dispatched = batch, token_nll(params, put(batch))
        if pending is not None:  # the device works on the next batch meanwhile
            _add(pending, token_bytes, positions, sources)
        pending = dispatched
    if pending is not None:
        _add(pending, token_bytes, positions, sources)
    seen = {i: score for i, score in enumerate(sources) if score.num_tokens}
    return Report(sum(sources, Score()), tuple(positions), seen, is_complete)


def _add(
    scored: tuple[Batch, jax.Array],
    token_bytes: np.ndarray,
    positions: list[Score],
    sources: list[Score],
) -> None:
    batch, nll = scored
    batch = Batch(*(np.asarray(x).reshape(-1) for x in batch))
    weights = batch.loss_weights.astype(np.float64)
    # A place of weight 0 is left out, not multiplied by 0: padding need not give a finite nll.
    nll = np.where(weights > 0, np.asarray(nll, np.float64).reshape(-1), 0.0)
    text_weights, num_bytes = byte_weights(batch, token_bytes)
    values = np.stack([weights * nll, weights, text_weights * nll, num_bytes])
    _group(values, np.frexp(batch.positions)[1], positions)
    _group(values, batch.source_ids, sources)


def _group(values: np.ndarray, keys: np.ndarray, scores: list[Score]) -> None:
    """Adds columns of `values` [4, n] to scores[key], lengthening `scores` as needed."""
    keys = np.where(values[1] > 0, keys, 0)
    sums = np.stack([np.bincount(keys, weights=row) for row in values], axis=1)
    scores += [Score()] * (len(sums) - len(scores))
    for i, row in enumerate(sums):
        scores[i] += Score(*row.tolist())


def tables(found: Mapping[str, Mapping[str, Any]]) -> tuple[Table, Table]:
    """What a person reads of `Report.to_mapping` of several sets: scores, and loss by position."""
    scores = _table("set", "loss", "bits per byte", "tokens", "bytes")
    losses: dict[tuple[int, int], dict[str, str]] = {}
    for name, x in found.items():
        counts = f"{x['tokens']:,}", f"{x['bytes']:,}"
        scores.add_row(name, _shown(x["loss"]), _shown(x["bpb"]), *counts)
        for place in x["by_position"]:
            row = losses.setdefault((place["first"], place["last"]), {})
            row[name] = _shown(place["loss"])
    positions = _table("loss at position", *found)
    for (first, last), row in sorted(losses.items()):
        place = f"{first:,}-{last:,}" if last > first else f"{first}"
        positions.add_row(place, *(row.get(name, "") for name in found))
    return scores, positions


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, padding=(0, 2, 0, 0))
    for column in others:
        table.add_column(column, justify="right")
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
