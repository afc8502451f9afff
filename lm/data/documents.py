"""Documents of the files of a source, and the pieces in which they are tokenized.

    .txt .md .py .txt.gz   one document
    .jsonl .jsonl.gz       one a line, the text under `text_key`
    .parquet               one a row, the text in the column `text_key`

A document's key is the name of its file, with a line or row number where a file holds many, or its
`id` field where it has one. By its key it is held out or not (lm/data/splits.py). Where several
documents have one `id`, their content decides in its place: so of the same text under one name all
copies lie on one side. Of documents whose tails are held out, both parts have the key.

A byte order mark is not a part of a text. A document that is empty or damaged (not UTF-8, not JSON)
is left out and counted, and so is a file that holds none. A file that cannot be read is told in one
line with its name, whatever the library raised. A key that is not there, or holds something else
than text, is a mistake of the configuration and told at once.

Memory: a document is held as its UTF-8 bytes, twice for a moment, and never as one string, which
takes up to four bytes a letter; one is tokenized in pieces of at most 256 KiB. Lines of JSON over
16 MiB are read in pieces too (lm/data/long_lines.py). One of more than 2 GiB is refused, so that a
small .gz that unpacks to the size of a disk is told of and not killed for memory.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import importlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lm import files
from lm.config import UserError, nearest
from lm.data import long_lines, splits
from lm.data.sources import LINES, PARQUET, PLAIN, Corpus, File, LeftOut, check_unchanged
from lm.data.splits import Data, Split

PIECE = 1 << 18  # bytes that are tokenized as one: a tokenizer takes hundreds of bytes for each
MOST = 1 << 31  # bytes of a document, or of the line of JSON that holds it
_WINDOW = 1 << 16  # bytes before the end of a piece in which it is cut between words
EMPTY, UNDECODABLE, NOT_JSON = "empty", "undecodable", "not JSON"  # why left out


class Document(NamedTuple):
    """`data`: UTF-8, not empty; `is_valid`: held out."""

    key: str
    data: Data
    is_valid: bool

    @property
    def text(self) -> str:
        return str(self.data, "utf-8")


class _Row(NamedTuple):
    """One document as its file holds it; `end`: where the reader stands in the file then. `wrong`
    says why there are no data.
    """

    key: str
    data: Data
    end: int
    place: str
    wrong: str = ""
    has_id: bool = False


def documents(
    corpus: Corpus,
    left_out: LeftOut,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[Document]:
    """Documents in order. `left_out` is told of what is not one; `advance`, of bytes read.

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
    """Which documents, or parts of them, are held out: read once for the tokenizer and the tokens
    that are made of them.
    """
    keys = (key for _, key in _keyed(corpus, LeftOut(), lambda num_bytes: None))
    return splits.choose(keys, corpus.config.valid_fraction)


def _keyed(
    corpus: Corpus, left_out: LeftOut, advance: Callable[[int], object]
) -> Iterator[tuple[_Row, str]]:
    """Rows that hold text, each with the key that decides whether it is held out."""
    repeated = _repeated(corpus)
    for file in corpus.files:
        position, is_empty = 0, True
        for row in _rows(file, corpus):
            is_empty = False
            advance(row.end - position)
            position = row.end
            wrong = row.wrong or _wrong(row.data)
            if wrong:
                left_out.add(wrong, row.place)
                continue
            key = row.key
            if row.has_id and _short_hash(key) in repeated:
                key = hashlib.sha256(row.data).hexdigest()
            yield row, key
        if is_empty:
            left_out.add(EMPTY, str(file.path))
        check_unchanged(file, corpus)
        advance(file.size - position)


def pieces(data: Data) -> Iterator[str]:
    """A text in strings of at most 256 KiB, cut where a word ends and a space begins, as tokenizers
    do in any case. Where no such place is near, it is cut between two letters.
    """
    start = 0
    while len(data) - start > PIECE:
        end = _cut(data, start + PIECE)
        yield str(data[start:end], "utf-8")
        start = end
    yield str(data[start:], "utf-8")


def _cut(data: Data, end: int) -> int:
    begin = _whole(data, end - _WINDOW)
    text = bytes(data[begin:end]).decode("utf-8", "ignore")
    at = text.rfind(" ")
    while at > 0 and not text[at - 1].isalnum():
        at = text.rfind(" ", 0, at)
    return begin + len(text[:at].encode()) if at > 0 else _whole(data, end)


def _whole(data: Data, place: int) -> int:
    """The last place at or before this one where a letter begins."""
    while data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _wrong(data: Data) -> str:
    if not len(data):
        return EMPTY
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), PIECE):
            decoder.decode(data[start : start + PIECE], final=start + PIECE >= len(data))
    except UnicodeError:
        return UNDECODABLE
    return ""


@functools.lru_cache(maxsize=16)
def _repeated(corpus: Corpus) -> frozenset[int]:
    """Hashes of the ids that several documents have; a pass over the files that can hold ids, once
    for the tokenizer and the tokens that are made of them.
    """
    if not 0 < corpus.config.valid_fraction < 1:
        return frozenset()
    found = array("Q")
    for file in corpus.files:
        if not file.name.endswith(PLAIN):
            found.extend(_short_hash(row.key) for row in _rows(file, corpus, only_ids=True))
    values, counts = np.unique(np.frombuffer(found, np.uint64), return_counts=True)
    return frozenset(values[counts > 1].tolist())


def _short_hash(key: str) -> int:
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def _rows(file: File, corpus: Corpus, *, only_ids: bool = False) -> Iterator[_Row]:
    """Every row of a file, in order; with `only_ids` those that have an id. Whatever the library
    that reads the file raises is told here.
    """
    with files.one_line(f"cannot read {file.path} of data.sources.{corpus.name}"):
        if file.name.endswith(PARQUET):
            yield from _parquet_rows(file, corpus, only_ids)
            return
        with open(file.path, "rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
            if file.name.endswith(LINES):
                number = 0
                while line := stream.readline(MOST + 1):
                    number += 1
                    _check_size(line, f"{file.path}:{number}", corpus)
                    if line.strip() and not (only_ids and b'"id"' not in line):
                        row = _json_row(line, number, raw.tell(), file, corpus)
                        if row.has_id or not only_ids:
                            yield row
            else:
                data = stream.read(MOST + 1)
                _check_size(data, str(file.path), corpus)
                data = data.removeprefix(codecs.BOM_UTF8)
                yield _Row(file.name, data, file.size, str(file.path))


def _check_size(data: bytes, place: str, corpus: Corpus) -> None:
    if len(data) > MOST:
        raise UserError(
            f"{place} of data.sources.{corpus.name} has more than {MOST:,} bytes, the most of one "
            "document; divide it"
        )


def _json_row(line: bytes, number: int, end: int, file: File, corpus: Corpus) -> _Row:
    text_key, name = corpus.config.text_key, corpus.name
    row = _Row(f"{file.name}:{number}", b"", end, f"{file.path}:{number}")
    try:
        record = long_lines.loads(line.removeprefix(codecs.BOM_UTF8), text_key)
    except UnicodeError:
        return row._replace(wrong=UNDECODABLE)
    except (ValueError, RecursionError):  # nested a thousandfold, a number of many thousand digits
        return row._replace(wrong=NOT_JSON)
    if not isinstance(record, dict):
        raise UserError(
            f"{row.place} of data.sources.{name} is a {type(record).__name__}; a line must be an "
            "object"
        )
    if text_key not in record:
        raise UserError(
            f"{row.place} has no key {text_key!r} (data.sources.{name}.text_key); "
            f"{nearest(text_key, record)}"
        )
    text = "" if record[text_key] is None else record[text_key]
    if isinstance(text, str):
        try:
            text = text.encode()
        except UnicodeError:  # JSON can spell half a surrogate pair
            text, row = b"", row._replace(wrong=UNDECODABLE)
    if not isinstance(text, bytes | bytearray):
        raise UserError(
            f"{row.place}: {text_key!r} (data.sources.{name}.text_key) is a {type(text).__name__}; "
            "it must be a string"
        )
    return _with_id(row._replace(data=text), record.get("id"))


def _parquet_rows(file: File, corpus: Corpus, only_ids: bool) -> Iterator[_Row]:
    text_key, name = corpus.config.text_key, corpus.name
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"{file.path} is Parquet and pyarrow is missing; pip install 'espalier[data]'"
        ) from error
    with parquet.ParquetFile(file.path) as table:
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
        if text_key not in schema.names:
            raise UserError(
                f"{file.path} has no column data.sources.{name}.text_key={text_key!r}; "
                f"{nearest(text_key, schema.names)}"
            )
        has_ids = "id" in schema.names and text_key != "id"
        for column in (text_key, "id") if has_ids else (text_key,):
            if schema.names.count(column) > 1:
                raise UserError(
                    f"{file.path} of data.sources.{name} has {schema.names.count(column)} columns "
                    f"of the name {column!r}; rename all but one"
                )
        kind = schema.field(text_key).type
        if not (_is_string(kind, arrow) or arrow.types.is_null(kind)):
            raise UserError(
                f"{file.path}: column text_key={text_key!r} holds {kind}; it must hold strings"
            )
        has_ids = has_ids and _is_id(schema.field("id").type, arrow)
        if only_ids and not has_ids:
            return
        columns = [*([] if only_ids else [text_key]), *(["id"] if has_ids else [])]
        number, binary = 0, arrow.large_binary()
        for batch in table.iter_batches(batch_size=256, columns=columns):
            texts = None if only_ids else batch.column(text_key).cast(binary)  # unchecked UTF-8
            ids = _ids(batch.column("id"), arrow) if has_ids else [None] * batch.num_rows
            for i, identity in enumerate(ids):
                number += 1
                found = None if texts is None else texts[i].as_buffer()
                key, end = f"{file.name}:{number}", file.size * number // num_rows
                row = _Row(key, memoryview(found or b""), end, f"{file.path}: row {number}")
                row = _with_id(row, identity)
                if row.has_id or not only_ids:
                    yield row


def _is_string(kind: Any, arrow: Any) -> bool:
    types = arrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_id(kind: Any, arrow: Any) -> bool:
    """Others, as times, name no document and are not read: not all of them are values of Python."""
    return _is_string(kind, arrow) or arrow.types.is_integer(kind)


def _ids(column: Any, arrow: Any) -> list[Any]:
    """Strings that are not UTF-8 with half surrogate pairs, as file names have them."""
    if not _is_string(column.type, arrow):
        return column.to_pylist()
    found = column.cast(arrow.large_binary()).to_pylist()
    return [None if x is None else x.decode("utf-8", "surrogateescape") for x in found]


def _with_id(row: _Row, value: Any) -> _Row:
    is_name = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return row._replace(key=str(value), has_id=True) if is_name else row
