"""Multi-query associative recall, MQAR (Arora et al. 2023, arXiv 2312.04927, appendix E).

    tokens   k1 v1 k2 v2 ... | k2  .  .  .  k1  .  .  .      pairs, then queries among filler
    targets   .  .  .  . ... | v2  .  .  .  v1  .  .  .      an answer is the target of its query

Ids: 0 is blank, keys are 1 .. vocab/2 - 1, values are vocab/2 .. vocab - 1. All keys of a row
differ and all its values differ. The queries stand at even distances 2 g behind the pairs. The g
are drawn one after another without replacement, p(g) ~ (g + 1)^(power - 1). The i-th draw is for
the i-th key, so early keys are asked early.

With `repeats`, that many of the pairs bind a key that another pair of the row also binds, in random
order. The answer is then the value bound last. (Each key is still asked once.)

Places without a question hold the blank, or any id if the filler is "random". Only the first 2 *
pairs places of a row bind keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.config import UserError, to_mapping
from lm.data.batch import Batch

# The second of the three numbers that seed training rows. A test is seeded by one number, which
# NumPy extends with zeros, so no test has the rows of a training.
TRAIN = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The options of one kind of row.

    Attributes:
      length: tokens of a row
      pairs: bindings in a row
      repeats: bindings of a key that another binding of the row also has
      filler: ids at places without a question
      power: spread of the queries: 1 is even, 0.01 (the paper's) puts most of them near the pairs
    """

    length: int
    pairs: int
    repeats: int = 0
    filler: Literal["blank", "random"] = "blank"
    power: float = 0.01

    @property
    def num_keys(self) -> int:
        """Number of different keys in a row, which is also its number of questions."""
        return self.pairs - self.repeats

    @property
    def name(self) -> str:
        """The name of the setting: 64x8, followed by what differs from the paper."""
        name = f"{self.length}x{self.pairs}"
        name += f"-r{self.repeats}" if self.repeats else ""
        name += "-random" if self.filler == "random" else ""
        return name + (f"-p{self.power:g}" if self.power != 0.01 else "")

    def problem(self, vocab_size: int) -> str | None:
        """What is wrong with this setting and vocabulary, in one line."""
        if self.pairs < 1 or 4 * self.pairs > self.length or self.length % 2:
            return (
                f"pairs={self.pairs} in length={self.length}: a pair takes four places of an even "
                f"length; set length to {max(4, 4 * self.pairs)} or more"
            )
        if not 0 <= self.repeats < self.pairs:
            return f"repeats={self.repeats} must be at least 0 and below pairs={self.pairs}"
        if self.power <= 0:
            return f"power={self.power} must be positive; 1 is uniform"
        if vocab_size // 2 - 1 < self.num_keys or vocab_size - vocab_size // 2 < self.pairs:
            return (
                f"a vocabulary of {vocab_size} has {vocab_size // 2 - 1} keys, a row needs "
                f"{self.num_keys} and {self.pairs} values; set vocab_size to "
                f"{2 * self.pairs + 2} or more"
            )
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Set:
    """Rows of one setting.

    Attributes:
      setting: the setting
      examples: number of rows
    """

    setting: Setting
    examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epochs:
    """Rows to train on (lm.data.loader.Rows). An epoch goes through every set once, in a new order.
    Each batch is of one set, and the batches of all sets are shuffled. The rows of a set that do
    not fill a batch are left out of that epoch.
    """

    sets: tuple[Set, ...]
    vocab_size: int
    batch_size: int
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        return {"mqar": to_mapping(self)}

    def batch(self, step: int) -> Batch:
        """The batch [B, T]; T is the length of the set that this step uses."""
        epoch, i = divmod(step, sum(one.examples // self.batch_size for one in self.sets))
        index, chosen = _plan(self, epoch)[i]
        return batch(Examples(*(field[chosen] for field in _rows(self)[index])))


@functools.lru_cache(maxsize=2)
def _plan(epochs: Epochs, epoch: int) -> list[tuple[int, np.ndarray]]:
    """For every batch of an epoch, in order: the set, and the rows of the set."""
    size = epochs.batch_size
    rng = np.random.default_rng([epochs.seed, TRAIN, len(epochs.sets), epoch])
    plan = []
    for index, one in enumerate(epochs.sets):
        order = rng.permutation(one.examples)
        whole = one.examples // size * size
        plan += [(index, chosen) for chosen in order[:whole].reshape(-1, size)]
    return [plan[i] for i in rng.permutation(len(plan))]


@functools.lru_cache(maxsize=1)
def _rows(epochs: Epochs) -> list[Examples]:
    seed, size = epochs.seed, epochs.vocab_size
    return [
        examples(one.setting, size, one.examples, [seed, TRAIN, index])
        for index, one in enumerate(epochs.sets)
    ]


class Examples(NamedTuple):
    """Rows of a setting. `last` is the place of the key in the binding that answers a question."""

    tokens: np.ndarray  # int32 [N, T]
    targets: np.ndarray  # int32 [N, T], 0 where nothing is asked
    last: np.ndarray  # int32 [N, T], 0 where nothing is asked
    is_repeated: np.ndarray  # bool [N, T]: the asked key is bound more than once


def examples(setting: Setting, vocab_size: int, num: int, seed: Sequence[int]) -> Examples:
    """`num` rows; the same arguments give the same rows.

    Raises:
      UserError: the setting does not fit its length or the vocabulary.
    """
    if (problem := setting.problem(vocab_size)) is not None:
        raise UserError(problem)
    rng = np.random.default_rng(seed)
    half, pairs, num_keys = vocab_size // 2, setting.pairs, setting.num_keys
    keys = 1 + _distinct(rng, num, half - 1, num_keys)
    values = half + _distinct(rng, num, vocab_size - half, pairs)
    bound = _bindings(rng, num, setting)
    rows = np.arange(num)
    last = np.zeros((num, num_keys), np.int32)
    count = np.zeros((num, num_keys), np.int32)
    for i in range(pairs):  # in order, so that the last binding of a key remains
        last[rows, bound[:, i]] = i
        count[rows, bound[:, i]] += 1

    found = Examples(*(np.zeros((num, setting.length), t) for t in (np.int32,) * 3 + (bool,)))
    found.tokens[:, 0 : 2 * pairs : 2] = np.take_along_axis(keys, bound, 1)
    found.tokens[:, 1 : 2 * pairs : 2] = values
    at = 2 * pairs + 2 * _gaps(rng, num, setting)
    if setting.filler == "random":
        shape = num, setting.length - 2 * pairs
        found.tokens[:, 2 * pairs :] = rng.integers(0, vocab_size, shape, np.int32)
    np.put_along_axis(found.tokens, at, keys, 1)
    np.put_along_axis(found.targets, at, np.take_along_axis(values, last, 1), 1)
    np.put_along_axis(found.last, at, 2 * last, 1)
    np.put_along_axis(found.is_repeated, at, count > 1, 1)
    return found


def batch(rows: Examples) -> Batch:
    """A batch in which each row is one document, and only answers have weight."""
    ones = np.ones_like(rows.tokens)
    return Batch(
        tokens=rows.tokens,
        targets=rows.targets,
        segment_ids=ones,
        positions=np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        source_ids=np.zeros_like(ones),
        loss_weights=(rows.targets > 0).astype(np.float32),
    )


def _bindings(rng: np.random.Generator, num: int, setting: Setting) -> np.ndarray:
    """Which of the row's keys each pair binds, int [num, pairs]."""
    once = np.broadcast_to(np.arange(setting.num_keys), (num, setting.num_keys))
    if not setting.repeats:
        return once
    again = rng.integers(0, setting.num_keys, (num, setting.repeats))
    return rng.permuted(np.concatenate([once, again], axis=1), axis=1)


def _gaps(rng: np.random.Generator, num: int, setting: Setting) -> np.ndarray:
    """The g of every question, distinct in a row, int [num, num_keys]."""
    space = (setting.length - 2 * setting.pairs) // 2
    # If clocks ring at rates p, clock i rings first with probability p_i; then the rest likewise.
    weight = np.arange(1, space + 1, dtype=np.float32) ** np.float32(setting.power - 1)
    clock = rng.standard_exponential((num, space), np.float32) / weight
    return np.argsort(clock, axis=1)[:, : setting.num_keys]


def _distinct(rng: np.random.Generator, num: int, size: int, count: int) -> np.ndarray:
    """`count` different numbers below `size` in random order, int32 [num, count].

    Floyd's algorithm draws the set (Bentley, CACM 1987); its order is then shuffled.
    """
    chosen = np.zeros((num, count), np.int32)
    for i, top in enumerate(range(size - count, size)):
        drawn = rng.integers(0, top + 1, num, np.int32)
        is_taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(is_taken, top, drawn)
    return rng.permuted(chosen, axis=1)
