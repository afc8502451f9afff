"""A key of five digits among meaningless sentences, asked for at the end
(lm/evals/_retrieval.py).

    exact@L           all digits are the likeliest, at L tokens in all; chance is 1e-5
    logprob@L         nats per token of the key
    gap@L             log-probability of the key minus that of a wrong one, nats; chance is 0
    exact_at_depth@d  by the place of the key, 0 at the start of the sentences, 1 at their end

The sentences are repeated whole, except that the beginning of the first one is cut to meet the
budget. The key stands between two sentences, at the place nearest to the depth asked for.
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
        del given, longest  # the sentences are the same for every run
        filler = parts.encode(FILLER)

        def sentences(size: int, depth: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
            del seed
            whole, rest = divmod(size, len(filler))
            num = min(whole, max(0, round((depth * size - rest) / len(filler))))
            start = filler[len(filler) - rest :]
            before = np.concatenate([start, np.tile(filler, num)])
            return before, np.tile(filler, whole - num)

        return sentences
