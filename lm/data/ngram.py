"""Unigram and bigram probabilities of a run's own training tokens: the baseline that a task reaches
without a model.

    p(b)     = (count(b) + 1) / (tokens + vocab)
    p(b | a) = (count(ab) + kinds(a) p(b)) / (count(a) + kinds(a))

kinds(a) is the number of different tokens that follow a. This is the interpolation of Witten & Bell
1991 (IEEE Transactions on Information Theory 37(4), method C), which has no parameter. Two tokens
of different documents do not form a pair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lm.data.store import Store


@dataclasses.dataclass(frozen=True, eq=False)
class Ngrams:
    """`counts` [vocab] of tokens. `pairs` [P]: the different pairs as a * vocab + b, sorted;
    `pair_counts` [P]. `followed`, `kinds` [vocab]: how many pairs, and how many different pairs,
    start with a.
    """

    counts: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray
    followed: np.ndarray
    kinds: np.ndarray

    def unigram(self, ids: np.ndarray) -> np.ndarray:
        """Nats of every token, float64 [n]."""
        return np.log(self.counts.sum() + len(self.counts)) - np.log(self.counts[ids] + 1.0)

    def bigram(self, ids: np.ndarray) -> np.ndarray:
        """Nats of every token given the one before it; for the first token, the unigram's. [n]"""
        nats = self.unigram(ids)
        a, b = np.asarray(ids[:-1], np.int64), np.asarray(ids[1:], np.int64)
        code = a * len(self.counts) + b
        place = np.minimum(np.searchsorted(self.pairs, code), max(0, len(self.pairs) - 1))
        together = np.zeros(len(code))
        if len(self.pairs):
            together = np.where(self.pairs[place] == code, self.pair_counts[place], 0)
        weight = self.followed[a] + self.kinds[a]
        alone = np.exp(-nats[1:])
        p = (together + self.kinds[a] * alone) / np.maximum(weight, 1)
        return np.append(nats[:1], -np.log(np.where(weight > 0, p, alone)))


def count(parts: Sequence[np.ndarray], vocab_size: int, end_of_text: int) -> Ngrams:
    """Counts in stretches of ids, in which every document ends with `end_of_text`."""
    counts = np.zeros(vocab_size, np.int64)
    codes = [np.zeros(0, np.int64)]
    for part in parts:
        ids = np.asarray(part, np.int64)
        counts += np.bincount(ids, minlength=vocab_size)
        inside = ids[:-1] != end_of_text
        codes.append((ids[:-1] * vocab_size + ids[1:])[inside])
    pairs, pair_counts = np.unique(np.concatenate(codes), return_counts=True)
    first = pairs // vocab_size
    followed = np.bincount(first, pair_counts, minlength=vocab_size)
    return Ngrams(counts, pairs, pair_counts, followed, np.bincount(first, minlength=vocab_size))


def of_training(
    stores: Mapping[str, Mapping[str, Store]],
    weights: Mapping[str, float],
    most: int,
    vocab_size: int,
    end_of_text: int,
) -> Ngrams:
    """Counts in the first training tokens of every source: about `most` in all, shared by
    weight.
    """
    trained = {name: weight for name, weight in weights.items() if weight > 0}
    shares = {name: math.ceil(most * w / sum(trained.values())) for name, w in trained.items()}
    parts = [stores[name]["train"].tokens[:share] for name, share in shares.items()]
    return count(parts, vocab_size, end_of_text)
