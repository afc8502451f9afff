"""Mixture: which source gives row i of the training stream, and which of its rows.

Sources are weighted by shares of training tokens. A period of `PERIOD` rows holds round(PERIOD *
share) rows of each; row m of n of a source belongs at the time (m + 1/2) / n of the period, and
sorting by these times interleaves the sources evenly: over every prefix each count stays within one
or two rows of its share. Position i is then a table look-up: no state, no drift. (Grain's own mix
truncates weights to integers with the smallest at 100, which can miss a share by a percent.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERIOD = 8192


class Mixture:
    """Maps row i of the stream to (source, row within that source)."""

    def __init__(self, shares: Sequence[float]):
        self.counts = period_counts(shares)
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in self.counts])
        labels = np.repeat(np.arange(len(self.counts)), self.counts)
        order = np.argsort(times, kind="stable")
        self._sources = labels[order]
        self._ranks = (
            np.arange(len(times)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        )[order]

    def __getitem__(self, index: int) -> tuple[int, int]:
        period, i = divmod(index, len(self._sources))
        source = int(self._sources[i])
        return source, period * int(self.counts[source]) + int(self._ranks[i])


def period_counts(shares: Sequence[float]) -> np.ndarray:
    """Rows of each source in a period, by largest remainders, and at least one.

    >>> period_counts([0.7, 0.3]).tolist(), period_counts([1.0]).tolist()
    ([5734, 2458], [1])
    """
    if len(shares) == 1:
        return np.array([1])
    exact = np.asarray(shares, np.float64) / np.sum(shares) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: PERIOD - int(counts.sum())]
    counts[largest] += 1
    return np.maximum(counts, 1)
