"""Multiple choice: the continuation a model finds likeliest after the question
(lm/evals/_requests.py has the files: HellaSwag, ARC, CommonsenseQA, ... as requests, and PIQA).

    none      log p(continuation | context)
    per_char  the same over its characters, the space at its start included; as published files and
              lm-evaluation-harness count them, whatever of them is scored
    pmi       log p(continuation | context) - log p(continuation | "Answer:")

After Brown et al. 2020 (arXiv 2005.14165, sec. 2.4) and Holtzman et al. 2021 (arXiv 2104.08315);
OLMES (arXiv 2406.08446) says which goes with which set. Choices that tie share the credit, so that
a model which knows nothing is at chance and not at the first answer.
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
    """A document of k rows, or with its bare ones 2 k; `chars` [k], `num_bytes` of the gold."""

    gold: int
    chars: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoice(_requests.Asked):
    """`accuracy` under `normalization`, `accuracy_sum` under none; of the right answer `bpb`, bits
    per byte, and `gold_logprob`, nats. Options are these and those of `Asked`.

    Attributes:
      labels: PIQA's file of labels
      normalization: what the log-probability of a choice is divided by, or compared with: its
        characters, nothing, or its probability without the question
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
                    told = f"doc_id + {_requests.BARE:,}"
                    raise UserError(
                        f"{document.place}: normalization=pmi needs {told}; set another"
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
