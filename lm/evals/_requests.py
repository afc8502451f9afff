"""Requests: how likely a continuation is after its context; and documents made of several requests.

    ids = encode(context + continuation), of which the context's are the first len(encode(context))

This cut is lm-evaluation-harness's. As there, white space at the end of the context belongs to the
continuation. At least one token is scored, even if the last token of the context also covers the
continuation. If both join into a single token, as "Ans" and "wer" may, each is encoded by itself.
If texts have a start token (data.tokenizer.bos), it precedes every context. Without one, as is
usual, the first token of a continuation after an empty context is given and not scored.

Bytes are counted for exactly the scored tokens: white space taken from the context counts, a first
token that is given does not.

Files of requests (AllenAI's OLMo-in-loop-evals) hold one JSON object per line:

    {"request": {"context": "...", "continuation": "..."}, "doc_id": 7, "idx": 2, "label": 0}

`idx` numbers the choices of a document, and `label` is the idx of the right one; it means nothing
if there is only one choice. doc_id 1,000,007 is document 7 again, without its question.

Files of PIQA hold {"goal": "...", "sol1": "...", "sol2": "..."} and come with a file of labels, one
0 or 1 per line. They are rendered in the same format as the others. The keys of a file's first line
decide which of the two kinds it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from lm.config import UserError
from lm.data.tokenizers import Tokenizer
from lm.evals import Given, Scored, _documents, _json_lines
from lm.evals._json_lines import Line
from lm.evaluation import scoring
from lm.evaluation.scoring import Row
from lm.files import one_line

BARE = 1_000_000  # doc_id n + BARE is document n without its question
REQUEST, PIQA = {"request", "doc_id"}, {"goal", "sol1", "sol2"}
TIE = 1e-6  # differences of log-probabilities that float32 cannot resolve


class Request(NamedTuple):
    """`place` names the request in error messages."""

    place: str
    context: str
    continuation: str


class Document(NamedTuple):
    """`choices` in the order of their idx; `gold` is the right one. `bare`: the same continuations
    without their question; empty if the file has none.
    """

    place: str
    gold: int
    choices: tuple[Request, ...]
    bare: tuple[Request, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of tasks that read requests.

    Attributes:
      path: .jsonl or .jsonl.gz files
      max_items: number of documents, evenly spread over the files; 0: all
      max_len: most tokens that the model may read for a request, which excludes the last one, as it
        is only predicted; 0: the run's context length
      overlong: what happens to a longer request: it is refused, or the start of its context is cut
        off
    """

    path: str = ""
    max_items: int = 0
    max_len: int = 0
    overlong: Literal["refuse", "left"] = "refuse"
    is_better: ClassVar[Literal["higher", "lower"]] = "higher"

    def problem(self) -> str | None:
        if not self.path:
            return "path is empty; set it to a .jsonl or .jsonl.gz file"
        for name in ("max_items", "max_len"):
            if getattr(self, name) < 0:
                return f"{name}={getattr(self, name)} must be >= 0"
        return None

    def rows(self, requests: Sequence[Request], given: Given) -> list[Row]:
        """One row per request, its continuation scored."""
        limit = self.max_len or given.data.context_length
        pieces = []
        for request, (ids, first) in zip(requests, split(requests, given.tokenizer), strict=True):
            scored = len(ids) - first
            if self.overlong == "refuse":
                advice = 'set max_len, or overlong="left"'
                scoring.check_length(request.place, len(ids) - 1, limit, advice)
            elif len(ids) - 1 > limit:
                advice = "overlong=left cuts contexts only; set max_len"
                scoring.check_length(f"{request.place}, continuation", scored, limit, advice)
                ids, first = ids[-limit - 1 :], limit + 1 - scored
            pieces.append((ids, first))
        return _documents.rows(pieces)


def split(requests: Sequence[Request], tokenizer: Tokenizer) -> list[tuple[np.ndarray, int]]:
    """For every request its ids, int32 [n], and how many of them are given, at least one.

    Raises:
      UserError: nothing is left to score.
    """
    cut = [len(one.context.rstrip()) for one in requests]
    contexts = [one.context[:end] for one, end in zip(requests, cut, strict=True)]
    different = list(dict.fromkeys(contexts))
    lengths = dict(zip(different, map(len, tokenizer.encode_batch(different)), strict=True))
    found, start = [], tokenizer.start
    whole = tokenizer.encode_batch([one.context + one.continuation for one in requests])
    for request, context, ids in zip(requests, contexts, whole, strict=True):
        if len(ids) == 1 and context and request.continuation:
            ids = [*tokenizer.encode(context), *tokenizer.encode(request.continuation)]
        ids = np.asarray([*start, *ids], np.int32)
        if len(ids) < 2 or not request.continuation:
            raise UserError(f"{request.place}: the continuation needs a token with one before it")
        found.append((ids, min(max(1, len(start) + lengths[context]), len(ids) - 1)))
    return found


def documents(path: str, labels: str = "") -> list[Document]:
    """Every document of the files, in order.

    Raises:
      UserError: a file is missing, empty or damaged, or a document has no right answer.
    """
    found: list[Document] = []
    files = _json_lines.files(path)
    if labels and len(files) > 1:
        raise UserError(f"labels={labels!r} is for one file and path={path!r} matches {len(files)}")
    for file in files:
        lines = _json_lines.read(file)
        keys = lines[0].record.keys()
        if keys >= PIQA:
            found += _piqa(lines, labels)
        elif keys >= REQUEST and not labels:
            found += _grouped(lines)
        elif keys >= REQUEST:
            raise UserError(f"labels={labels!r} is set and {file} has its own; leave labels empty")
        else:
            known = " or ".join(", ".join(sorted(kind)) for kind in (REQUEST, PIQA))
            raise UserError(f"{lines[0].place} has keys {', '.join(keys)}; known: {known}")
    return found


def logprobs(scored: Sequence[Scored]) -> np.ndarray:
    """The log-probability of every row's continuation in nats, <= 0, float64 [rows]."""
    return -np.array([one.nll.sum(dtype=np.float64) for one in scored])


def num_bytes(rows: Sequence[Row], tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of the scored tokens of every row, int64 [rows]."""
    scored = (tokenizer.token_bytes[row.targets[row.weights > 0]] for row in rows)
    return np.array([sizes.sum() for sizes in scored], np.int64)


def credit(scores: np.ndarray, gold: int) -> float:
    """1 if the right choice has the largest of the scores [k]; 1 / m if m choices share it."""
    best = np.isclose(scores, scores.max(), rtol=TIE, atol=TIE)
    return float(best[gold] / max(1, best.sum()))


def _grouped(lines: Sequence[Line]) -> list[Document]:
    groups: dict[int, dict[int, Line]] = {}
    asked: dict[str, Request] = {}
    for line in lines:
        group = groups.setdefault(line.number("doc_id"), {})
        if (idx := line.number("idx")) in group:
            raise UserError(f"{line.place}: idx={idx} is also at {group[idx].place}")
        group[idx] = line
        inner = line.inner("request")
        asked[line.place] = Request(line.place, inner.text("context"), inner.text("continuation"))
    found = []
    for doc_id, group in groups.items():
        if doc_id >= BARE and doc_id - BARE not in groups:
            place = next(iter(group.values())).place
            raise UserError(f"{place}: doc_id={doc_id} and there is no doc_id={doc_id - BARE}")
        if doc_id < BARE:
            found.append(_document(group, groups.get(doc_id + BARE, {}), asked))
    return found


def _document(
    group: dict[int, Line], bare: dict[int, Line], asked: Mapping[str, Request]
) -> Document:
    """`group` and `bare` by idx; `asked` by place."""
    first = next(iter(group.values()))
    order = sorted(group)
    if bare and sorted(bare) != order:
        place = next(iter(bare.values())).place
        raise UserError(f"{place} has idx {sorted(bare)} and {first.place} has {order}")
    choices = tuple(asked[group[i].place] for i in order)
    twins = tuple(asked[bare[i].place] for i in order if bare)
    gold = order.index(_label(list(group.values()), order)) if len(order) > 1 else 0
    return Document(first.place, gold, choices, twins)


def _label(lines: Sequence[Line], order: Sequence[int]) -> int:
    """The label that all choices of a document share; it must be one of their idx."""
    labels = {repr(line.record.get("label")): line.record.get("label") for line in lines}
    label = next(iter(labels.values()))
    if len(labels) > 1 or type(label) is not int or label not in order:
        message = f"label={' and '.join(labels)} is not one of idx {list(order)}"
        raise UserError(f"{lines[0].place}: {message}: no right answer")
    return label


def _piqa(lines: Sequence[Line], labels: str) -> list[Document]:
    if not labels:
        raise UserError(f"{lines[0].place} is PIQA; set labels to its file of labels")
    path = Path(labels).expanduser()
    with one_line(f"cannot read labels={labels!r}"):
        gold = path.read_text(encoding="utf-8").split()
    if len(gold) != len(lines):
        raise UserError(f"{path} has {len(gold)} labels for {len(lines)} lines; they must agree")
    found = []
    for number, (line, label) in enumerate(zip(lines, gold, strict=True), start=1):
        if label not in ("0", "1"):
            raise UserError(f"{path}:{number}: {label!r} is not a label of PIQA; it must be 0 or 1")
        question = f"Question: {line.text('goal')}\nAnswer:"
        solutions = [f" {line.text(key)}" for key in ("sol1", "sol2")]
        asked = (
            tuple(Request(line.place, context, solution) for solution in solutions)
            for context in (question, "Answer:")
        )
        found.append(Document(line.place, int(label), *asked))
    return found
