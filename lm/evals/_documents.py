"""Documents as token ids, windows inside them, and rows that share equal arrays.

files or validation sets -> documents long enough -> windows -> rows

A window lies inside one document, and windows do not overlap. The windows of a document are evenly
spread, with equal gaps around them, so that they rarely meet title pages and licences at its ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lm.config import UserError
from lm.data import documents as documents_lib
from lm.data import sources
from lm.data.config import held_out
from lm.data.sources import LeftOut
from lm.data.tokenizers import Tokenizer
from lm.evals import Given
from lm.evaluation import scoring
from lm.evaluation.scoring import Row


class Window(NamedTuple):
    """`ids` [length]; `unit` is the number of the document that the window was taken from."""

    unit: int
    ids: np.ndarray


def at_least(given: Given, path: str, text_key: str, tokens: int, most: int) -> list[np.ndarray]:
    """The first `most` documents of at least `tokens` tokens, in order: int32 [n] each. `path` is
    as in data.sources.*.path; "" means the run's validation documents. The ids exclude the start
    and the end of text.

    Raises:
      UserError: no document is that long, or the files cannot be read.
    """
    left_out = LeftOut()
    read = _read(given.tokenizer, path, text_key, tokens, left_out) if path else _stored(given)
    found, longest = [], 0
    for ids in read:
        longest = max(longest, len(ids))
        if len(ids) >= tokens:
            found.append(np.asarray(ids, np.int32))
            if len(found) == most:
                break
    if left_out.counts:
        sources.warn_left_out(f"path={path!r}: {len(found):,} documents", str(left_out))
    if not found:
        where = f"path={path!r}" if path else "the run's validation sets"
        raise UserError(
            f"no document of {where} has the {tokens:,} tokens of a window, the longest has "
            f"{longest:,}; ask for shorter windows or set path to longer documents"
        )
    return found


def windows(
    documents: Sequence[np.ndarray], length: int, per_document: int, most: int
) -> list[Window]:
    """At most `most` windows of `length` ids, from as many documents as possible."""
    num = min(len(documents), most)
    chosen = [documents[i * len(documents) // num] for i in range(num)]
    counts = [min(per_document, len(ids) // length) for ids in chosen]
    while sum(counts) > most:
        counts[int(np.argmax(counts))] -= 1
    found = []
    for unit, (ids, count) in enumerate(zip(chosen, counts, strict=True)):
        free = len(ids) - count * length
        starts = [i * length + free * (i + 1) // (count + 1) for i in range(count)]
        found += [Window(unit, ids[start : start + length].copy()) for start in starts]
    return found


def rows(pieces: Iterable[tuple[np.ndarray, int]]) -> list[Row]:
    """`scoring.row(ids, first)` of every piece. Tokens and targets are views of its ids. Rows of
    the same length and `first` share their other arrays.
    """
    alike: dict[tuple[int, int], Row] = {}
    found = []
    for ids, first in pieces:
        key = len(ids), first
        if key not in alike:
            alike[key] = scoring.row(ids, first)
        found.append(alike[key]._replace(tokens=ids[:-1], targets=ids[1:]))
    return found


def _stored(given: Given) -> Iterator[np.ndarray]:
    for name, source in given.data.sources.items():
        if source.valid_fraction > 0:
            store = given.prepared.stores[name]["valid"]
            for start, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
                yield store.tokens[start + len(given.tokenizer.start) : end - 1]


def _read(
    tokenizer: Tokenizer, path: str, text_key: str, tokens: int, left_out: LeftOut
) -> Iterator[np.ndarray]:
    """The documents that may be long enough; then the longest of the others, so that an error can
    name its length. A document has no more tokens than bytes, so most need not be tokenized.
    """
    longest = b""
    try:
        corpus = sources.create("task", held_out(path, text_key))
        corpus = dataclasses.replace(corpus, end_of_text=tokenizer.end_of_text)
        left_out.include(corpus.left_out)
        for document in documents_lib.documents(corpus, left_out):
            if isinstance(document.data, np.ndarray):
                yield document.data
            elif len(document.data) >= tokens:
                yield tokenizer.encode_batch([document.text])[0]
            elif len(document.data) > len(longest):
                longest = bytes(document.data)
    except UserError as error:  # it names a source of the run, but this is not one
        message = str(error).replace("data.sources.task.", "").replace(" of data.sources.task", "")
        raise UserError(message) from error
    yield tokenizer.encode_batch([longest.decode()])[0]
