"""Multiple choice: the model chooses the continuation that it finds likeliest after the question.
lm/evals/_requests.py describes the files: HellaSwag, ARC, CommonsenseQA, ... as requests, and PIQA.

    none      log p(continuation | context)
    per_char  the same divided by the number of characters of the continuation, including the space
              at its start; lm-evaluation-harness counts them like this, whatever part is scored
    pmi       log p(continuation | context) - log p(continuation | "Answer:")

After Brown et al. 2020 (arXiv 2005.14165, sec. 2.4) and Holtzman et al. 2021 (arXiv 2104.08315);
OLMES (arXiv 2406.08446) says which normalization belongs to which set. Choices that tie share the
credit, so a model that knows nothing scores at chance, and not as if it chose the first answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from lm.config import UserError
from lm.evals import Given, Items, Number, Scored, _json_lines, _requests
from lm.evaluation import statistics


class Choice(NamedTuple):
    """A document of k rows, or 2 k with its bare ones. `chars` [k]; `num_bytes` of the right
    choice.
    """

    gold: int
    chars: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoice(_requests.Asked):
    """`accuracy` uses `normalization`, `accuracy_sum` none. For the right answer `bpb` is bits per
    byte and `gold_logprob` nats. The options are these and those of `Asked`.

    Attributes:
      labels: PIQA's file of labels
      normalization: what the log-probability of a choice is divided by or compared with: its number
        of characters, nothing, or its log-probability without the question
    """

    labels: str = ""
    normalization: Literal["per_char", "none", "pmi"] = "per_char"
    headline: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of questions"

    def items(self, given: Given) -> Items:
        documents = _requests.documents(self.path, self.labels)
        chosen = _json_lines.spread(documents, self.max_items)
        requests = []
        for document in chosen:
            if len(document.choices) < 2:
                raise UserError(f"{document.place} has one choice; gold_bpb is the task for those")
            requests += document.choices
            if self.normalization == "pmi":
                if not document.bare:
                    message = f"doc_id + {_requests.BARE:,}"
                    raise UserError(
                        f"{document.place}: normalization=pmi needs {message}; set another"
                    )
                requests += document.bare
        rows = self.rows(requests, given)
        sizes = _requests.num_bytes(rows, given.tokenizer)
        about, start = [], 0
        for document in chosen:
            chars = np.array([len(one.continuation) for one in document.choices])
            about.append(Choice(document.gold, chars, int(sizes[start + document.gold])))
            start += len(chars) * (2 if self.normalization == "pmi" else 1)
        return Items(rows, about)

    def numbers(self, items: Items, scored: Sequence[Scored]) -> dict[str, Number]:
        about: list[Choice] = items.about
        logprobs = _requests.logprobs(scored)
        credits: dict[str, list[float]] = {"accuracy": [], "accuracy_sum": []}
        gold, start = [], 0
        for choice in about:
            k = len(choice.chars)
            sums = scores = logprobs[start : start + k]
            start += k
            if self.normalization == "per_char":
                scores = sums / choice.chars
            elif self.normalization == "pmi":
                scores = sums - logprobs[start : start + k]
                start += k
            credits["accuracy"].append(_requests.credit(scores, choice.gold))
            credits["accuracy_sum"].append(_requests.credit(sums, choice.gold))
            gold.append(sums[choice.gold])
        chance = float(np.mean([1 / len(choice.chars) for choice in about]))
        sizes = [choice.num_bytes for choice in about]
        return {
            **{name: statistics.share(found, chance=chance) for name, found in credits.items()},
            "bpb": statistics.ratio(-np.array(gold) / math.log(2), sizes, keep_units=True),
            "gold_logprob": statistics.mean(gold),
        }
