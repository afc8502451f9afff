"""Batch-size warmup: the batch doubles until it has its full size.

    data.batch_size 64, first 8, length "3e6 tokens", rows of 1,024 tokens
    -> 8, 16 and 32 rows for a third of 3e6 tokens each, rounded up to full batches, then 64

MiniCPM-1.2B doubles once, from 2 to 4 M tokens (arXiv 2404.06395) [P]; GPT-3 grows linearly over
its first 4 to 12 G tokens (arXiv 2005.14165, appendix B) UNCONFIRMED. Doubling needs one
compilation per size. The batch remains a pure function of the step. Every size takes a whole number
of full batches' rows, so that after the warmup steps end at the same tokens as without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple

from lm.mapping import NOT_NEGATIVE, Bound, Duration

EXPONENT = Bound("must lie in [0, 1]; set 0.5", lambda x: 0.0 <= x <= 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """The batch-size warmup: the batch doubles until it has its full size.

    Attributes:
      first: rows of the first batch; 0: no warmup
      length: length of the warmup, in tokens or in steps of the full batch
      rate_exponent: c: during the warmup the learning rate is multiplied by (rows / batch_size)^c;
        0.5 is the square-root rule, 1 the rule of SGD (lm/laws/batch_rate.py)
    """

    first: Annotated[int, NOT_NEGATIVE]
    length: Duration
    rate_exponent: Annotated[float, EXPONENT]

    def problem(self, batch_size: int) -> str | None:
        """What is wrong with the warmup, in one line."""
        where = f"data.batch_warmup.first={self.first}"
        if not self.first:
            if not (self.length.value or self.rate_exponent):
                return None
            return (
                f"{where} with length={self.length}, rate_exponent={self.rate_exponent:g}; set "
                "first=1 or more rows, or set length='0 tokens' and rate_exponent=0"
            )
        doubled = self.first << max(1, _doublings(self.first, batch_size))
        if doubled != batch_size:
            likely = f"data.batch_warmup.first={batch_size // 2}"
            likely = f"data.batch_size={doubled}" if batch_size % 2 else likely
            return f"{where} does not double to data.batch_size={batch_size}; set {likely}"
        if self.length.unit == "percent" or not self.length.value:
            return (
                f"data.batch_warmup.length={self.length} must be a positive number of tokens or "
                "steps; write '1e6 tokens'"
            )
        return None


# For commands that do not support a warmup.
REMEDY = "set first=0, length='0 tokens' and rate_exponent=0 of data.batch_warmup"
NO_WARMUP = BatchWarmup(first=0, length=Duration(0.0, "tokens"), rate_exponent=0.0)


class Batches(NamedTuple):
    """The number of rows of every batch. `size` is the full size; before it come `doublings`
    smaller sizes, each of which takes the rows of `span` full batches.
    """

    size: int
    doublings: int = 0
    span: int = 0

    @property
    def stages(self) -> Iterator[tuple[int, int]]:
        """For each smaller size: its rows, and the number of its steps."""
        for i in range(self.doublings, 0, -1):
            yield self.size >> i, self.span << i

    @property
    def warmup_steps(self) -> int:
        return sum(steps for _, steps in self.stages)

    def of(self, step: int) -> int:
        """Rows of the batch at step number `step`; the first step is number 0."""
        return self.before(step + 1) - self.before(step)

    def before(self, step: int) -> int:
        """Rows of all batches before step number `step`."""
        rows = 0
        for size, steps in self.stages:
            if step < steps:
                return rows + size * step
            rows, step = rows + size * steps, step - steps
        return rows + self.size * step

    def steps(self, rows: float) -> float:
        """How many steps take `rows` rows: the inverse of `before`, with fractions of a step."""
        done = 0
        for size, steps in self.stages:
            if rows < size * steps:
                return done + rows / size
            rows, done = rows - size * steps, done + steps
        return done + rows / self.size


def batches(size: int, warmup: BatchWarmup, context_length: int) -> Batches:
    """The rows of every batch under a warmup whose `problem` is None."""
    if not warmup.first:
        return Batches(size)
    per_step, doublings = size * context_length, _doublings(warmup.first, size)
    tokens = warmup.length.tokens(run_tokens=math.nan, tokens_per_step=per_step)
    return Batches(size, doublings, max(1, math.ceil(tokens / doublings / per_step - 1e-9)))


def _doublings(first: int, size: int) -> int:
    return (size // first).bit_length() - 1
