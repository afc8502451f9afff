"""The forgetting curve (Liu et al. 2024, arXiv 2410.04727): does a model remember text n tokens
ago?

    copy  segment, gap of n tokens, segment     how many tokens of the second copy are the likeliest
    lm    other text, gap of n tokens, segment  the same tokens, gap and positions, no first copy

In the paper the copied text itself grows. Here its size is fixed, so every n scores the same
tokens. The task is teacher forced, so it needs no skill at following prompts and works for models
of any size. The segment, the gap after it, and the other text (as long as the segment, taken from
behind the longest gap) are one stretch of a document. The first token of the second copy is not
scored: nothing before it says that a copy begins. `lm` is what a model without memory achieves, and
is the chance level of `copy`. Documents are the units of the intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from lm.config import UserError
from lm.evals import Given, Items, Number, Scored, _documents
from lm.evaluation import statistics

SHORTEST_GAP = 16


class _About(NamedTuple):
    """`unit` of every segment. The rows are ordered by segment, then gap, then copy and lm."""

    unit: np.ndarray
    gaps: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The options of this task.

    Attributes:
      path: files of documents, as data.sources.NAME.path takes them; empty: the validation sets of
        the run
      text_key: key of the text in JSON lines and Parquet
      segment: tokens of the copied text
      gaps: tokens between the two copies; none: the powers of two from 16 on that, with both
        copies, fit the run's context length
      max_items: number of segments in all, spread over the documents
    """

    path: str = ""
    text_key: str = "text"
    segment: int = 64
    gaps: tuple[int, ...] = ()
    max_items: int = 64
    headline: ClassVar[str] = "copy"
    is_better: ClassVar[str] = "higher"
    unit: ClassVar[str] = "share of tokens"

    def problem(self) -> str | None:
        if self.segment < 2:
            return f"segment={self.segment} must be >= 2: the first token of a copy is not scored"
        if self.max_items < 1:
            return f"max_items={self.max_items} must be >= 1"
        if wrong := [gap for gap in self.gaps if gap < 0]:
            return f"gaps holds {wrong[0]}; a gap must be >= 0"
        if len(set(self.gaps)) < len(self.gaps):
            return f"gaps={self.gaps} holds a gap twice"
        return None

    def items(self, given: Given) -> Items:
        gaps = self.gaps or self._fitting(given.data.context_length)
        length = 2 * self.segment + max(gaps)
        documents = _documents.at_least(given, self.path, self.text_key, length, self.max_items)
        chosen = _documents.windows(documents, length, self.max_items, self.max_items)
        pieces, first = [], self.segment + 1
        for _, ids in chosen:
            segment, rest = ids[: self.segment], ids[self.segment :]
            for gap in gaps:
                for start in (segment, rest[-self.segment :]):
                    row = np.concatenate([start, rest[:gap], segment])
                    pieces.append((row, gap + first))
        unit = np.array([window.unit for window in chosen])
        return Items(_documents.rows(pieces), _About(unit, gaps))

    def _fitting(self, context: int) -> tuple[int, ...]:
        room = context + 1 - 2 * self.segment  # the last token of a row is only a target
        gaps = [1 << i for i in range(31) if SHORTEST_GAP <= 1 << i <= room]
        if not gaps:
            raise UserError(
                f"segment={self.segment} twice and a gap of {SHORTEST_GAP} do not fit the run's "
                f"context of {context}; lower segment or set gaps"
            )
        return tuple(gaps)

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        about: _About = items.about
        hits = np.array([one.hit.sum() for one in scored], np.float64)
        hits = hits.reshape(len(about.unit), len(about.gaps), 2)

        def both(hits: np.ndarray, at: str) -> dict[str, Number]:
            """The numbers for hits [segments, gaps, 2], all gaps together."""
            sums = np.bincount(about.unit) * hits.shape[1] * float(self.segment - 1)
            copy, lm = (np.bincount(about.unit, hits[:, :, i].sum(axis=1)) for i in range(2))
            without = statistics.share_of_several(lm, sums)
            copied = statistics.share_of_several(copy, sums, chance=without.value, keep_units=True)
            return {f"copy{at}": copied, f"lm{at}": without}

        found = both(hits, "")
        for i, gap in enumerate(about.gaps):
            found |= both(hits[:, i : i + 1], f"@{gap}")
        return found
