"""Packing: which pieces of documents make up each row of `context_length` training pairs.

A document of n tokens and its end of text is x[0..n]. Its pairs (x[i], x[i+1]) for i < n are made
before packing. So no target belongs to another document, no pair is lost at the edge of a row, and
the end of text is a target but never an input. An epoch holds every pair exactly once.

- concat: documents, shuffled per epoch, are joined end to end and cut every `context_length` pairs.
  Only the last row is padded.
- best_fit: documents longer than a row are cut into whole rows and a rest. Rests and short
  documents are placed, longest first, in the row with the least space that still holds them (Ding
  et al., arXiv 2404.10830). No document that fits a row is cut.

A plan is a pure function of (lengths, context_length, packing, seed, epoch), and so is the order of
its rows. (Grain's shuffle takes milliseconds per row if there are few rows.)
"""

from __future__ import annotations

import bisect
import threading
from typing import Literal, NamedTuple

import numpy as np

VERSION = 1  # of the order of rows: raise it if the same seed gives other batches
_CACHED_EPOCHS = 2  # prefetching looks one epoch ahead of the one being read


class Plan(NamedTuple):
    """Row r holds the pieces row_ptr[r] .. row_ptr[r+1] - 1. Piece i is `length[i]` pairs of
    document `doc[i]` from pair `start[i]` on."""

    row_ptr: np.ndarray
    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Packer:
    """Plans of one source, made when their epoch is first read."""

    def __init__(
        self,
        lengths: np.ndarray,
        context_length: int,
        packing: Literal["concat", "best_fit"],
        seed: tuple[int, ...],
    ):
        self._lengths = np.asarray(lengths, np.int64)
        self._context_length = context_length
        self._seed = seed
        self._bins = None
        if packing == "best_fit":
            rests = np.sort(self._lengths % context_length)[::-1]
            self._bins = best_fit_bins(rests[rests > 0], context_length)
            num_bins = int(self._bins.max(initial=-1)) + 1
            self.num_rows = int(np.sum(self._lengths // context_length)) + num_bins
        else:
            self.num_rows = -(-int(self._lengths.sum()) // context_length)
        self._epochs: dict[int, tuple[Plan, np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def fill(self) -> float:
        """Average share of a row's places that hold a pair; the same in every epoch."""
        return float(self._lengths.sum()) / (self.num_rows * self._context_length)

    def epoch(self, epoch: int) -> tuple[Plan, np.ndarray]:
        """The plan of an epoch and the order in which its rows are read."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= _CACHED_EPOCHS:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = self._create(epoch)
            return self._epochs[epoch]

    def _create(self, epoch: int) -> tuple[Plan, np.ndarray]:
        rng = np.random.default_rng((*self._seed, epoch))  # hashed: seeds and epochs do not overlap
        order = rng.permutation(len(self._lengths))
        if self._bins is None:
            plan = concat(self._lengths, self._context_length, order)
        else:
            plan = best_fit(self._lengths, self._context_length, order, self._bins)
        return plan, rng.permutation(self.num_rows)


def concat(lengths: np.ndarray, context_length: int, order: np.ndarray) -> Plan:
    """Documents end to end in `order`, cut every `context_length` pairs.

    >>> plan = concat(np.array([7, 3, 9]), 5, np.arange(3))
    >>> [list(map(int, field)) for field in plan]
    [[0, 1, 3, 4, 5], [0, 0, 1, 2, 2], [0, 5, 0, 0, 5], [5, 2, 3, 5, 4]]
    """
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    begins = ends - lengths[order]
    row_begins = np.arange(0, total, context_length)
    cuts = np.union1d(begins, row_begins)
    place = np.searchsorted(ends, cuts, side="right")
    row_ptr = np.append(np.searchsorted(cuts, row_begins), len(cuts))
    return Plan(row_ptr, order[place], cuts - begins[place], np.diff(cuts, append=total))


def best_fit(lengths: np.ndarray, context_length: int, order: np.ndarray, bins: np.ndarray) -> Plan:
    """Whole rows of long documents, then rests by `bins`. `order` decides among equal rests."""
    whole = lengths // context_length
    row_docs = np.repeat(np.arange(len(lengths)), whole)
    row_starts = (
        np.arange(len(row_docs)) - np.repeat(np.cumsum(whole) - whole, whole)
    ) * context_length
    ranked = order[np.argsort(-(lengths[order] % context_length), kind="stable")]
    ranked = ranked[lengths[ranked] % context_length > 0]
    by_bin = np.argsort(bins, kind="stable")
    rests = ranked[by_bin]
    num_bins = int(bins.max(initial=-1)) + 1
    first = np.searchsorted(bins[by_bin], np.arange(num_bins + 1))
    return Plan(
        row_ptr=np.concatenate([np.arange(len(row_docs)), len(row_docs) + first]),
        doc=np.concatenate([row_docs, rests]),
        start=np.concatenate([row_starts, whole[rests] * context_length]),
        length=np.concatenate(
            [np.full(len(row_docs), context_length), lengths[rests] % context_length]
        ),
    )


def best_fit_bins(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each length (longest first): the fullest that still holds it, or a new one.

    >>> best_fit_bins(np.array([6, 5, 4, 3, 2]), 10).tolist()
    [0, 1, 0, 1, 1]
    """
    bins = np.empty(len(lengths), np.int64)
    num_bins = 0
    spaces: list[int] = []  # distinct free spaces, ascending; at most `capacity` of them
    open_bins: dict[int, list[int]] = {}  # free space -> bins with it
    for i, length in enumerate(lengths.tolist()):
        at = bisect.bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            bins[i] = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space], spaces[at]
        else:
            space, bins[i] = capacity, num_bins
            num_bins += 1
        left = space - length
        if left and left not in open_bins:
            bisect.insort(spaces, left)
            open_bins[left] = []
        if left:
            open_bins[left].append(int(bins[i]))
    return bins
