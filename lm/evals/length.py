"""Does a model use context beyond the length it was trained at? Three protocols over windows of
long documents, all windows with the same T = `max_len` tokens and targets, in nats per token:

    A  window@L    all targets, read in disjoint rows of L = shortest, 2 shortest, ..., T tokens
    B  context@c   the last `targets` targets of each window, read in rows of L tokens that end with
                   it, so that c = L - targets tokens precede them
    C  position@t  the window read whole: targets predicted from t tokens and up to the next t;
                   there are 8 t in each octave

A scores the same text for every L, and B the same targets for every c; only the use of context
changes. The row of B is the last row of A, and that of C is the whole window, so no row is scored
twice.

`gain` is B at the longest context minus B in the row whose length is nearest to the training
length. It is negative if longer context helps and positive if it hurts; above 0.1 nats per token
the model explodes. It has no chance level: a model that ignores the additional context gives 0,
which the interval then contains. Documents are the units of all intervals, in the same order in all
numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from lm.config import UserError
from lm.evals import Given, Items, Number, Scored, _documents
from lm.evaluation import statistics

PER_OCTAVE = 8
MOST_TARGETS = 1024


class _About(NamedTuple):
    """`pieces`: for every row its window, its L, and whether it is the last row of the window.
    `unit`, `num_bytes`: for every window. `nearest`: the L that is nearest to the training length.
    """

    pieces: list[tuple[int, int, bool]]
    unit: np.ndarray
    num_bytes: np.ndarray
    targets: int
    nearest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """The options of this task.

    Attributes:
      path: files of documents, as data.sources.NAME.path takes them; empty: the validation sets of
        the run
      text_key: key of the text in JSON lines and Parquet
      max_len: tokens of the longest rows, `shortest` times a power of two
      shortest: tokens of the shortest rows
      windows_per_document: most windows of a document
      max_windows: most windows in all
      targets: number of last tokens of a row that are scored; 0: half of the training length, at
        most 1,024; with more than `train_len`, `gain` starts from rows longer than that
      train_len: context length of the training; 0: the run's
      protocols: some of A, B and C (above); B costs nothing in addition to A, nor C in addition to
        B
    """

    path: str = ""
    text_key: str = "text"
    max_len: int = 8192
    shortest: int = 512
    windows_per_document: int = 4
    max_windows: int = 32
    targets: int = 0
    train_len: int = 0
    protocols: tuple[str, ...] = ("A", "B", "C")
    headline: ClassVar[str] = "gain"
    is_better: ClassVar[str] = "lower"
    unit: ClassVar[str] = "nats per token"

    def problem(self) -> str | None:
        for name in ("shortest", "windows_per_document", "max_windows"):
            if (value := getattr(self, name)) < 1:
                return f"{name}={value} must be >= 1"
        if self.max_len < 2 * self.shortest:
            return f"max_len={self.max_len} must be at least twice shortest={self.shortest}"
        if self._lengths[-1] != self.max_len:
            return (
                f"max_len={self.max_len} must be shortest={self.shortest} times a power of two; "
                f"the nearest below is {self._lengths[-1]}"
            )
        if not 0 <= self.targets <= self.max_len // 4:
            most = self.max_len // 4  # leaves a shorter row than the whole window to compare with
            return f"targets={self.targets} must lie in 0..{most}, a quarter of max_len"
        if self.train_len < 0:
            return f"train_len={self.train_len} must be >= 0"
        if unknown := set(self.protocols) - {"A", "B", "C"}:
            return f"protocols holds {sorted(unknown)[0]!r}; known: A, B, C"
        if "B" not in self.protocols:
            return f"protocols={self.protocols} lacks B, which gives the headline {self.headline}"
        return None

    @property
    def _lengths(self) -> list[int]:
        num = int(math.log2(self.max_len / self.shortest) + 1e-9)
        return [self.shortest << i for i in range(num + 1)]

    def items(self, given: Given) -> Items:
        train_len = self.train_len or given.data.context_length
        targets = self.targets or max(1, min(MOST_TARGETS, train_len // 2))
        columns, nearest = self._columns(train_len, targets)
        documents = _documents.at_least(
            given, self.path, self.text_key, self.max_len + 1, self.max_windows
        )
        chosen = _documents.windows(
            documents, self.max_len + 1, self.windows_per_document, self.max_windows
        )
        places, pieces = [], []
        for w, window in enumerate(chosen):
            for length in self._lengths if "A" in self.protocols else columns:
                starts = range(0, self.max_len, length)
                for start in starts if "A" in self.protocols else starts[-1:]:
                    places.append((w, length, start == starts[-1]))
                    pieces.append((window.ids[start : start + length + 1], 1))
        num_bytes = [given.tokenizer.token_bytes[window.ids[1:]].sum() for window in chosen]
        unit = np.array([window.unit for window in chosen])
        about = _About(places, unit, np.array(num_bytes), targets, nearest)
        return Items(_documents.rows(pieces), about)

    def _columns(self, train_len: int, targets: int) -> tuple[list[int], int]:
        """Row lengths that leave context before the targets; and which of them stands for
        training.
        """
        distance = lambda length: abs(math.log2(length / train_len))
        if min(self._lengths, key=distance) == self.max_len:
            raise UserError(
                f"max_len={self.max_len} is the row nearest the training length {train_len}, so "
                "nothing is longer; raise max_len or set train_len"
            )
        columns = [length for length in self._lengths if length > targets]
        return columns, min(columns, key=distance)

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        about: _About = items.about
        windows = {length: np.zeros(len(about.unit)) for length in self._lengths}
        tails = {length: np.zeros(len(about.unit)) for length in self._lengths}
        whole = np.zeros((len(about.unit), self.max_len), np.float32)
        for (w, length, is_last), one in zip(about.pieces, scored, strict=True):
            windows[length][w] += one.nll.sum(dtype=np.float64)
            if is_last:
                tails[length][w] = one.nll[-about.targets :].sum(dtype=np.float64)
            if length == self.max_len:
                whole[w] = one.nll
        gain = tails[self.max_len] - tails[about.nearest]
        targets = np.full(len(about.unit), about.targets)
        found = {"gain": _ratio(about.unit, gain, targets)}
        if "A" in self.protocols:
            tokens = np.full(len(about.unit), self.max_len)
            for length, nll in windows.items():
                found[f"window@{length}"] = _ratio(about.unit, nll, tokens)
            for length, nll in windows.items():
                bits = nll / math.log(2)
                found[f"window_bpb@{length}"] = _ratio(about.unit, bits, about.num_bytes)
        for length, nll in tails.items():
            if length > about.targets:
                context = length - about.targets
                found[f"context@{context}"] = _ratio(about.unit, nll, targets)
        if "C" in self.protocols:
            found |= _positions(about.unit, whole)
        return found


def _positions(unit: np.ndarray, nll: np.ndarray) -> dict[str, Number]:
    """nll [windows, T] -> `position@t`; the first target is predicted from t = 1 token."""
    length = nll.shape[1]
    octaves = np.arange(PER_OCTAVE * math.ceil(math.log2(length + 1)) + 1) / PER_OCTAVE
    edges = np.unique(np.ceil(2.0**octaves).astype(np.int64))
    edges = np.append(edges[edges < length], length + 1)  # the last target is not alone in a bucket
    found = {}
    for first, end in itertools.pairwise(edges):
        sums = nll[:, first - 1 : end - 1].sum(axis=1, dtype=np.float64)
        number = _ratio(unit, sums, np.full(len(unit), end - first))
        found[f"position@{first}"] = dataclasses.replace(number, units=None)
    return found


def _ratio(unit: np.ndarray, numerators: np.ndarray, denominators: np.ndarray) -> Number:
    """The ratio over windows, with their documents as units."""
    sums = [np.bincount(unit, values) for values in (numerators, denominators)]
    return statistics.ratio(*sums, keep_units=True)
