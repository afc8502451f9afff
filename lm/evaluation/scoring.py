"""Rows of tokens -> the negative log-likelihood of every target, and whether it was the likeliest.

    rows, any lengths -> by length into buckets -> batches of one shape a bucket -> device -> rows

A bucket is the training context length, or a power of two rounded up to a multiple of
mesh.sequence. Its batches hold as many tokens as a training step, unless one row is longer than
that. The device function is compiled at most once per bucket. Every evaluation of a model goes
through here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import build as build_lib
from lm.build import Build
from lm.config import UserError
from lm.data.batch import Batch
from lm.parallel import placement, processes

SMALLEST_BUCKET = 32


class Row(NamedTuple):
    """One row to score, numpy arrays [n]; fields as in `Batch`. Targets of weight 0 are not
    scored.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


class Scored(NamedTuple):
    """For each target [n] of a row: its nats, and whether no other token was likelier (of equal
    ones the first counts). For targets of weight 0 they are 0 and False.
    """

    nll: np.ndarray
    hit: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cost:
    """What scoring cost. `tokens` excludes padding; `flops` is the forward pass on these tokens."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tokens + other.tokens, self.flops + other.flops, self.seconds + other.seconds
        )


def row(tokens: Sequence[int] | np.ndarray, first: int = 1) -> Row:
    """One document; each of tokens[first:] is scored given all tokens before it. Arrays [len - 1].

    >>> row([5, 6, 7], first=2).weights.tolist()
    [0.0, 1.0]
    """
    ids = np.asarray(tokens, np.int32)
    index = np.arange(len(ids) - 1, dtype=np.int32)
    return Row(
        ids[:-1], ids[1:], np.ones_like(index), index, (index >= first - 1).astype("float32")
    )


class Scorer:
    """Applies a build's `score(params, batch) -> nll, hit` to rows of any length."""

    def __init__(self, built: Build, params: Any) -> None:
        self._built, self._params = built, params
        self._flops: dict[int, float] = {}
        self.buckets: set[int] = set()  # lengths compiled so far
        self.cost = Cost()

    def __call__(
        self, rows: Sequence[Row], advance: Callable[[int], object] = lambda tokens: None
    ) -> list[Scored]:
        """One `Scored` per row, in order. `advance` is called with numbers of tokens done; it may
        update a bar, or raise to stop.
        """
        start = time.perf_counter()
        found: list[Scored | None] = [None] * len(rows)
        pending: tuple[Sequence[int], Any] | None = None
        for bucket, chosen in self._batches(rows):
            batch = self._built.put(self._batch(rows, chosen, bucket))
            dispatched = chosen, self._built.score(self._params, batch)
            self.buckets.add(bucket)
            if pending is not None:  # meanwhile the device works on the next batch
                self._collect(rows, pending, found)
            pending = dispatched
            advance(sum(len(rows[i].tokens) for i in chosen))
        if pending is not None:
            self._collect(rows, pending, found)
        self.cost += self._cost(rows, time.perf_counter() - start)
        return [scored for scored in found if scored is not None]

    def _bucket(self, length: int) -> int:
        context = self._built.config.data.context_length
        where = self._built.mesh, self._built.model.context.layout
        bucket = placement.row_length(max(SMALLEST_BUCKET, length), *where)
        return context if length <= context < bucket else bucket

    def _batches(self, rows: Sequence[Row]) -> Iterable[tuple[int, Sequence[int]]]:
        """(bucket, indices of rows) of every batch, longest first, so that memory runs out at once
        or not at all.
        """
        by_bucket: dict[int, list[int]] = {}
        for i, one in enumerate(rows):
            by_bucket.setdefault(self._bucket(len(one.tokens)), []).append(i)
        for bucket in sorted(by_bucket, reverse=True):
            size, chosen = self._num_rows(bucket), by_bucket[bucket]
            yield from ((bucket, chosen[i : i + size]) for i in range(0, len(chosen), size))

    def _num_rows(self, bucket: int) -> int:
        ways = build_lib.batch_ways(self._built.mesh)
        wanted = max(1, self._built.config.tokens_per_step // bucket)
        return -(-wanted // ways) * ways

    def _batch(self, rows: Sequence[Row], chosen: Sequence[int], bucket: int) -> Batch:
        """The part of the chosen rows that this process loads."""
        held = self._built.share.rows(self._num_rows(bucket))
        shape = len(held), bucket
        fields = [np.zeros(shape, np.int32) for _ in range(4)] + [np.zeros(shape, np.float32)]
        for place, one in ((n, rows[chosen[i]]) for n, i in enumerate(held) if i < len(chosen)):
            for field, values in zip(fields, one, strict=True):
                field[place, : len(values)] = values
        tokens, targets, segment_ids, positions, weights = fields
        return Batch(tokens, targets, segment_ids, positions, np.zeros(shape, np.int32), weights)

    def _collect(
        self, rows: Sequence[Row], pending: tuple[Sequence[int], Any], found: list[Scored | None]
    ) -> None:
        chosen, arrays = pending
        nll, hit = processes.to_host(arrays)
        where = self._built.mesh, self._built.model.context.layout
        nll, hit = (placement.shards(*where).in_order(x, 1) for x in (nll, hit))
        for place, i in enumerate(chosen):
            used = rows[i].weights > 0
            # A target of weight 0 is replaced, not multiplied by 0: the nll of padding need not be
            # finite.
            values = np.where(used, nll[place, : len(used)], 0.0).astype(np.float32)
            found[i] = Scored(values, hit[place, : len(used)] & used)

    def _cost(self, rows: Sequence[Row], seconds: float) -> Cost:
        lengths = [int(np.count_nonzero(one.segment_ids)) for one in rows]
        for length in set(lengths) - self._flops.keys():
            self._flops[length] = build_lib.forward_flops(self._built, length)
        return Cost(sum(lengths), sum(self._flops[length] for length in lengths), seconds)


def check_length(what: str, tokens: int, limit: int, advice: str) -> None:
    """Refuses a row longer than a task's limit.

    Raises:
      UserError: the row is longer.
    """
    if tokens > limit:
        raise UserError(f"{what} has {tokens:,} tokens, the limit is {limit:,}; {advice}")
