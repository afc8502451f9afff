"""Writing: documents -> pieces -> batches for the tokenizer -> ids -> the two splits of a store."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm import files
from lm.config import UserError
from lm.data import documents
from lm.data.documents import Document
from lm.data.sources import Corpus, LeftOut
from lm.data.store import SPLITS, Writer
from lm.data.tokenizers import Tokenizer

_BATCH = 1 << 20  # bytes of text, or ids, that are held at once


class _Piece(NamedTuple):
    """A text that is tokenized in one call, or ids that are taken as they are. A document is one or
    more of these pieces; its final piece has `is_last`.
    """

    key: str
    content: str | np.ndarray
    is_valid: bool
    is_last: bool


def write_splits(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, advance: Callable[[int], object]
) -> None:
    """Writes both splits below a folder. For a source with `max_tokens`, the document that reaches
    this limit is the last one.

    Raises:
      UserError: a document cannot be tokenized, loses bytes, or holds an unknown id.
    """
    left_out, most = LeftOut(), corpus.config.max_tokens or sys.maxsize
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(contextlib.closing(Writer(folder / split, tokenizer)))
            for split in SPLITS
        }
        for piece, ids in _tokenized(documents.documents(corpus, left_out, advance), tokenizer):
            writer = writers[SPLITS[piece.is_valid]]
            writer.append(ids, _num_bytes(piece, ids, tokenizer), is_last=piece.is_last)
            if piece.is_last and sum(x.num_tokens for x in writers.values()) >= most:
                break
        for writer in writers.values():
            writer.finish(corpus.description, left_out, documents.split(corpus).rule)


def _num_bytes(piece: _Piece, ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """The number of UTF-8 bytes of a piece. Also checks that its ids stand for these bytes."""
    if isinstance(piece.content, str):
        if lost := tokenizer.lost(piece.content, ids):
            raise UserError(f"document {piece.key!r}: {lost}")
        return len(piece.content.encode())
    if ids.max() >= tokenizer.vocab_size:
        raise UserError(
            f"document {piece.key!r} has id {ids.max()} and the tokenizer {tokenizer.vocab_size:,} "
            "ids; set data.tokenizer to the one that made them, or another token_dtype"
        )
    return int(tokenizer.token_bytes[ids].sum())


def _tokenized(
    found: Iterator[Document], tokenizer: Tokenizer
) -> Iterator[tuple[_Piece, np.ndarray]]:
    for batch in _batches(found):
        yield from zip(batch, _encoded(batch, tokenizer), strict=True)


def _encoded(batch: list[_Piece], tokenizer: Tokenizer) -> list[np.ndarray]:
    texts = [piece.content for piece in batch if isinstance(piece.content, str)]
    try:
        with files.one_line(f"cannot tokenize document {batch[0].key!r}"):
            encoded = iter(tokenizer.encode_batch(texts))
            return [next(encoded) if isinstance(x.content, str) else x.content for x in batch]
    except UserError:
        if len(batch) == 1:
            raise
    half = len(batch) // 2  # split until the document that cannot be tokenized is alone
    return _encoded(batch[:half], tokenizer) + _encoded(batch[half:], tokenizer)


def _batches(found: Iterator[Document]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for document in found:
        data, rest = document.data, len(document.data)
        is_ids = isinstance(data, np.ndarray)
        for content in documents.parts(data) if is_ids else documents.pieces(data):
            length = len(content.encode() if isinstance(content, str) else content)
            rest, size = rest - length, size + length
            batch.append(_Piece(document.key, content, document.is_valid, not rest))
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
