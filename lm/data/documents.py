"""The documents in the files of a source, read by lm/readers, and the pieces in which they are
tokenized.

A document's key is its `id` field if it has one. Otherwise it is the name of its file, with a line
or row number if the file holds many. The key decides whether the document is held out
(lm/data/splits.py). If several documents share an `id`, their content decides instead, so that all
copies of one text lie on the same side. If the tails of documents are held out, both parts have the
document's key.

A byte order mark is not part of a text. A document that is empty or damaged (not UTF-8, not JSON)
is left out and counted, and so is a file without documents. If a file cannot be read, the error is
one line with its name, whatever the library raised. A key that is missing, or does not hold text,
is a mistake in the configuration and is raised at once.

Memory: a document is held as UTF-8 bytes, for a moment twice. It is never one Python string, which
takes up to four bytes per character; it is tokenized in pieces of at most 256 KiB. Lines of JSON
over 16 MiB are read in pieces too (lm/readers/_long_lines.py). A document of more than 2 GiB is
refused, so that a small .gz that unpacks to terabytes is an error and does not exhaust memory.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from lm import readers
from lm.data import splits
from lm.data.sources import Corpus, LeftOut, check_unchanged
from lm.data.splits import Split
from lm.data.streams import Stream
from lm.readers import EMPTY, UNDECODABLE, Data, Row

PIECE = 1 << 18  # bytes tokenized at once: a tokenizer needs hundreds of bytes of memory for each
_WINDOW = 1 << 16  # bytes before the end of a piece in which a place between words is searched


class Document(NamedTuple):
    """`data`: UTF-8, or the ids [n] from a file of tokens; never empty. `is_valid`: held out."""

    key: str
    data: Data | np.ndarray
    is_valid: bool

    @property
    def utf8(self) -> Data:
        """The data of a document of text, as opposed to ids."""
        assert not isinstance(self.data, np.ndarray), self.key
        return self.data

    @property
    def text(self) -> str:
        return str(self.utf8, "utf-8")


def documents(
    corpus: Corpus,
    left_out: LeftOut,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[Document]:
    """Documents in order. What is not a document is added to `left_out`; `advance` is called with
    numbers of bytes read.

    Raises:
      UserError: a file cannot be read, changed meanwhile, or has no text under the key.
    """
    chosen, fraction = split(corpus), corpus.config.valid_fraction
    for row, key in _keyed(corpus, left_out, advance):
        if chosen.rule != splits.TAILS:
            yield Document(row.key, row.data, splits.is_valid(key, chosen.threshold))
            continue
        place = splits.tail(row.data, fraction)
        for data, is_valid in ((row.data[:place], False), (row.data[place:], True)):
            if len(data):
                yield Document(row.key, data, is_valid)


@functools.lru_cache(maxsize=16)
def split(corpus: Corpus) -> Split:
    """Which documents, or parts of documents, are held out. Cached: training a tokenizer and
    tokenizing both need it.
    """
    keys = (key for _, key in _keyed(corpus, LeftOut(), lambda num_bytes: None))
    return splits.choose(keys, corpus.config.valid_fraction)


def _keyed(
    corpus: Corpus, left_out: LeftOut, advance: Callable[[int], object]
) -> Iterator[tuple[Row, str]]:
    """Rows that hold text, each with the key that decides whether the row is held out."""
    repeated = _repeated(corpus)
    for file in corpus.files:
        position, is_empty = 0, True
        is_stream = isinstance(file.path, Stream)
        for row in (file.path.rows if is_stream else partial(readers.rows, file))(corpus.asked):
            is_empty = False
            advance(row.end - position)
            position = row.end
            wrong = row.wrong or _wrong(row.data)
            if wrong:
                left_out.add(wrong, row.place)
                continue
            key = row.key
            # A stream is read only once, so whether its ids repeat cannot be known beforehand.
            if is_stream or (row.has_id and _short_hash(key) in repeated):
                key = hashlib.sha256(row.data).hexdigest()
            yield row, key
        if is_empty:
            left_out.add(EMPTY, str(file.path))
        check_unchanged(file, corpus)
        advance(file.size - position)


def pieces(data: Data) -> Iterator[str]:
    """A text in strings of at most 256 KiB, cut between a word and a space, where tokenizers cut
    anyway. If there is no such place nearby, it is cut between two characters.
    """
    start = 0
    while len(data) - start > PIECE:
        end = _cut(data, start + PIECE)
        yield str(data[start:end], "utf-8")
        start = end
    yield str(data[start:], "utf-8")


def parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Ids in arrays of at most PIECE ids."""
    return (ids[start : start + PIECE] for start in range(0, len(ids), PIECE))


def _cut(data: Data, end: int) -> int:
    begin = _whole(data, end - _WINDOW)
    text = bytes(data[begin:end]).decode("utf-8", "ignore")
    at = text.rfind(" ")
    while at > 0 and not text[at - 1].isalnum():
        at = text.rfind(" ", 0, at)
    return begin + len(text[:at].encode()) if at > 0 else _whole(data, end)


def _whole(data: Data, place: int) -> int:
    """The last place at or before `place` at which a character begins."""
    while data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _wrong(data: Data | np.ndarray) -> str:
    if not len(data):
        return EMPTY
    if isinstance(data, np.ndarray):
        return ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), PIECE):
            decoder.decode(data[start : start + PIECE], final=start + PIECE >= len(data))
    except UnicodeError:
        return UNDECODABLE
    return ""


@functools.lru_cache(maxsize=16)
def _repeated(corpus: Corpus) -> frozenset[int]:
    """Hashes of the ids that several documents share. It takes a pass over the files that can hold
    ids. Cached: training a tokenizer and tokenizing both need it.
    """
    if not 0 < corpus.config.valid_fraction < 1:
        return frozenset()
    found = array("Q")
    for file in corpus.files:
        reader = None if isinstance(file.path, Stream) else readers.find(file.name)
        if reader is not None and reader.has_ids:
            asked = corpus.asked._replace(only_ids=True)
            found.extend(_short_hash(row.key) for row in readers.rows(file, asked))
    values, counts = np.unique(np.frombuffer(found, np.uint64), return_counts=True)
    return frozenset(values[counts > 1].tolist())


def _short_hash(key: str) -> int:
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")
