"""The key of lm/evals/passkey.py, with the same numbers, in natural text, which is full of other
things to remember.

The text is a stretch of one document; where it starts depends only on the seed. The key stands at
the depth asked for, or at the nearest full stop if one is within the length of passkey's filler.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.evals import Given, _documents
from lm.evals._retrieval import FILLER, Hay, Parts, Retrieval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Retrieval):
    """The options of this task, in addition to those of `Retrieval`.

    Attributes:
      path: files of documents, as data.sources.NAME.path takes them; empty: the validation sets of
        the run
      text_key: key of the text in JSON lines and Parquet
    """

    path: str = ""
    text_key: str = "text"

    def hay(self, given: Given, parts: Parts, longest: int) -> Hay:
        documents = _documents.at_least(given, self.path, self.text_key, longest, self.seeds)
        stop, reach = parts.encode(".")[-1], len(parts.encode(FILLER))

        def text(size: int, depth: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
            ids = documents[seed % len(documents)]
            start = int(np.random.default_rng(seed).random() * (len(ids) - size + 1))
            ids, place = ids[start : start + size], round(depth * size)
            near = np.flatnonzero(ids[max(0, place - reach) : place + reach] == stop)
            near += max(0, place - reach) + 1
            near = near[abs(near - place) < reach]
            if len(near):
                place = int(near[np.argmin(abs(near - place))])
            return ids[:place], ids[place:]

        return text
