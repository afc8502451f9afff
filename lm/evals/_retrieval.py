"""A key of five digits is stated once in a long text and asked for at its end. The task decides
what the text is made of (passkey, needle).

    [example] prefix, hay, " The pass key is 12345. Remember it. 12345 is the pass key.", hay,
    " What is the pass key? The pass key is", " 12345"

After Mohtashami & Jaggi 2023 (arXiv 2305.16300), but with an exact budget: prompt and answer have L
tokens together. Every part is encoded by itself and the ids are joined. The key includes the space
before it, so its ids are the same wherever it stands. Hay fills the rest.

The answer is teacher forced: if all its tokens are the likeliest, greedy decoding would write it. A
wrong key is drawn too. Both keys are uniform among those with the same number of tokens, and
neither is in the hay. So the gap between their log-probabilities has mean 0 under guessing, and it
moves long before a small model gets a key right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from lm.config import UserError
from lm.data.tokenizers import Tokenizer
from lm.evals import Given, Items, Number, Scored, _documents
from lm.evaluation import statistics

DIGITS = 5
CHANCE = 10.0**-DIGITS
SHORTEST = 64
PREFIX = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I "
    "will quiz you about the important information there."
)
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)

# (hay tokens, depth in [0, 1], seed) -> the hay before the key and after it
Hay = Callable[[int, float, int], tuple[np.ndarray, np.ndarray]]


class Parts:
    """The fixed texts, encoded; hay and keys go between them."""

    def __init__(self, tokenizer: Tokenizer, shots: int) -> None:
        self.encode = lambda text: tokenizer.encode_batch([text])[0]
        said = " The pass key is", ". Remember it.", " is the pass key."
        self._said = [self.encode(text) for text in said]
        self._asked = self.encode(" What is the pass key? The pass key is")
        self._prefix, self._end = self.encode(PREFIX), self.encode(".\n\n")
        self._shots = shots

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer without hay. A key has at most as many tokens as bytes."""
        key = np.zeros(DIGITS + 1, np.int32)
        nothing = key[:0]
        return len(self.prompt([key, key], nothing, nothing)) + len(key)

    def statement(self, key: np.ndarray) -> np.ndarray:
        is_, remember, was = self._said
        return np.concatenate([is_, key, remember, key, was])

    def prompt(self, keys: list[np.ndarray], before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """`keys`: the key to ask for, and that of the example, if there is one."""
        key, other = keys
        example = [self.statement(other), self._asked, other, self._end] * self._shots
        hay = [self._prefix, before, self.statement(key), after]
        return np.concatenate([*example, *hay, self._asked])


class Item(NamedTuple):
    """One key, which makes two rows: the right and the wrong answer, each of `size` tokens."""

    length: int
    depth: float
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Options of the tasks that hide a key in a text.

    Attributes:
      lengths: tokens of a row, including the answer; none: powers of two up to the run's context
        length, and that length
      depths: number of places of the key, evenly spread from the start of the text to its end
      seeds: number of keys at each place
      shots: solved examples that come first, 0 or 1
    """

    lengths: tuple[int, ...] = ()
    depths: int = 10
    seeds: int = 5
    shots: int = 0
    headline: ClassVar[str] = "exact"
    is_better: ClassVar[str] = "higher"
    unit: ClassVar[str] = "share of keys"

    def problem(self) -> str | None:
        if self.depths < 2:
            return f"depths={self.depths} must be >= 2: the start and the end are two"
        if self.seeds < 1:
            return f"seeds={self.seeds} must be >= 1"
        if self.shots not in (0, 1):
            return f"shots={self.shots} must be 0 or 1"
        if wrong := [length for length in self.lengths if length < 1]:
            return f"lengths holds {wrong[0]}; a length must be >= 1"
        if len(set(self.lengths)) < len(self.lengths):
            return f"lengths={self.lengths} holds a length twice"
        return None

    def hay(self, given: Given, parts: Parts, longest: int) -> Hay:
        """A function that makes the hay around the key, for rows of up to `longest` tokens."""
        raise NotImplementedError

    def items(self, given: Given) -> Items:
        parts = Parts(given.tokenizer, self.shots)
        lengths = self._lengths(parts.most_tokens, given.data.context_length)
        hay = self.hay(given, parts, max(lengths))
        pieces, about = [], []
        for length in lengths:
            for depth in range(self.depths):
                share = depth / (self.depths - 1)
                for seed in range(self.seeds):
                    rng = np.random.default_rng((length, depth, seed))
                    prompt, right, wrong = _draw(parts, hay, length, (share, seed), rng)
                    for answer in (right, wrong):
                        pieces.append((np.concatenate([prompt, answer]), len(prompt)))
                    about.append(Item(length, share, len(right)))
        return Items(_documents.rows(pieces), about)

    def _lengths(self, least: int, context: int) -> tuple[int, ...]:
        powers = [1 << i for i in range(31) if SHORTEST <= 1 << i < context]
        lengths = self.lengths or tuple(n for n in [*powers, context] if n >= least)
        if not lengths:
            raise UserError(
                f"the question takes {least} tokens of this tokenizer and the run's context is "
                f"{context}; set lengths"
            )
        if min(lengths) < least:
            raise UserError(
                f"lengths holds {min(lengths)} and the question alone takes {least} tokens of this "
                f"tokenizer; set lengths to at least {least}"
            )
        return lengths

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        about: list[Item] = items.about
        hits = np.array([one.hit.sum() for one in scored[::2]])
        logs = -np.array([one.nll.sum(dtype=np.float64) for one in scored]).reshape(-1, 2)
        size = np.array([item.size for item in about])
        exact, gap = hits == size, logs[:, 0] - logs[:, 1]
        found = {
            "exact": statistics.share(exact, chance=CHANCE),
            "gap": statistics.mean(gap, chance=0.0),
        }
        length = np.array([item.length for item in about])
        for n in np.unique(length):
            at = length == n
            found[f"exact@{n}"] = statistics.share(exact[at], chance=CHANCE)
            found[f"logprob@{n}"] = statistics.ratio(logs[at, 0], size[at])
            found[f"gap@{n}"] = statistics.mean(gap[at], chance=0.0)
        depth = np.array([item.depth for item in about])
        for x in np.unique(depth):
            number = statistics.share(exact[depth == x], chance=CHANCE)
            found[f"exact_at_depth@{x:.3g}"] = number
        return found


def _draw(
    parts: Parts, hay: Hay, length: int, place: tuple[float, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt, right answer and wrong answer. Keys are drawn until they fit each other and the
    hay.
    """
    while True:
        drawn = [f" {key:0{DIGITS}d}" for key in rng.integers(10**DIGITS, size=3)]
        right, wrong, other = (parts.encode(text) for text in drawn)
        if len(set(drawn)) < 3 or len(right) != len(wrong):
            continue
        nothing = right[:0]
        fixed = parts.prompt([right, other], nothing, nothing)
        before, after = hay(length - len(fixed) - len(right), *place)
        prompt = parts.prompt([right, other], before, after)
        assert len(prompt) + len(right) == length, "the budget is exact"
        if occurrences(prompt, right) == 2 and not occurrences(prompt, wrong):
            return prompt, right, wrong


def occurrences(ids: np.ndarray, key: np.ndarray) -> int:
    """How often the ids of `key` [k] occur consecutively in `ids` [n]."""
    if len(ids) < len(key):
        return 0
    spans = np.lib.stride_tricks.sliding_window_view(ids, len(key))
    return int(np.all(spans == key, axis=1).sum())
