"""A key of five digits among sentences that say nothing, asked for at the end
(lm/evals/_retrieval.py).

    exact@L           all digits likeliest, at L tokens in all; chance is 1e-5
    logprob@L         nats per token of the key
    gap@L             log-probability of the key minus that of a wrong one, nats; chance is 0
    exact_at_depth@d  by where the key stands, 0 at the start of the sentences, 1 at their end

The sentences are repeated whole, but for the first, whose beginning is cut so that the budget is
met; the key stands between two of them, the nearest place to the depth asked for.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.evals import Given
from lm.evals._retrieval import FILLER, Hay, Parts, Retrieval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Retrieval):
    """The options are those of `Retrieval`."""

    def hay(self, given: Given, parts: Parts, longest: int) -> Hay:
        del given, longest  # the same sentences for every run, as many as are wanted
        filler = parts.encode(FILLER)

        def sentences(size: int, depth: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
            del seed
            whole, rest = divmod(size, len(filler))
            num = min(whole, max(0, round((depth * size - rest) / len(filler))))
            start = filler[len(filler) - rest :]
            before = np.concatenate([start, np.tile(filler, num)])
            return before, np.tile(filler, whole - num)

        return sentences
