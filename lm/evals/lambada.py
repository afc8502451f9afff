"""LAMBADA: the last word of a passage, which people can guess from the passage but not from its
last sentence (Paperno et al. 2016, arXiv 1606.06031). Lines of {"text": "..."}, as in OpenAI's test
set.

    the word    " " + what follows the last space
    accuracy    share of words of which every token is the likeliest: greedy decoding writes them
    perplexity  exp(mean nats per word)
    bpb         bits per byte of the words

The cut at the last space is lm-evaluation-harness's; other white space does not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lm.config import UserError
from lm.evals import Given, Items, Number, Scored, _json_lines, _requests
from lm.evals._json_lines import Line
from lm.evals._requests import Request
from lm.evaluation import statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lambada(_requests.Asked):
    """The options are those of `Asked`."""

    headline: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of last words"

    def items(self, given: Given) -> Items:
        files = _json_lines.files(self.path)
        lines = [line for file in files for line in _json_lines.read(file)]
        requests = [_request(line) for line in _json_lines.spread(lines, self.max_items)]
        rows = self.rows(requests, given)
        return Items(rows, _requests.num_bytes(rows, given.tokenizer))

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        hits = [
            one.hit.sum() == np.count_nonzero(row.weights)
            for one, row in zip(scored, items.rows, strict=True)
        ]
        nats = -_requests.logprobs(scored)
        mean = statistics.mean(nats)
        sides = (math.exp(min(x, 700.0)) for x in (mean.value, mean.low, mean.high))
        return {
            "accuracy": statistics.share(hits),
            "perplexity": Number(*sides, num=mean.num),
            "bpb": statistics.ratio(nats / math.log(2), items.about, keep_units=True),
        }


def _request(line: Line) -> Request:
    context, space, word = line.text("text").rpartition(" ")
    if not (context.strip() and word.strip()):
        raise UserError(f"{line.place}: no word follows the last space; mend or remove the line")
    return Request(line.place, context, space + word)
