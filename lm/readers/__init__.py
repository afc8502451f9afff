"""Readers: each turns one kind of file into documents. One file per reader; this folder is listed.

    name of the file -> the reader that has the name's ending among its `endings`
    file -> bytes, decompressed if the name ends with .gz or .zst -> rows(opened, asked) -> Row

A reader yields every document that a file should hold, even damaged ones; a row then says what is
wrong, and is counted. A key that is missing, or does not hold text, is a mistake in the
configuration and is raised at once. Whatever a library raises becomes one line here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from lm import extras, files
from lm.families import READERS
from lm.mapping import UserError

MOST = 1 << 31  # bytes of a document, or of the line or JSON file that holds it
EMPTY, UNDECODABLE, NOT_JSON = "empty", "undecodable", "not JSON"  # reasons for leaving it out
PACKED = (".gz", ".zst")
_EXTRA = {"datasets": "stream", "fsspec": "data", "pyarrow": "data"}  # package -> extra with it

Data = bytes | bytearray | memoryview


class Place(Protocol):
    """Where a file lies, for example a `Path`. Messages show its `str()`."""

    def open(self, mode: str = "rb", /) -> Any: ...


class File(NamedTuple):
    """`name`: relative to the root, with forward slashes. `version` changes when the content does;
    for a local file it is the time of the last change in nanoseconds.
    """

    path: Any
    name: str
    size: int
    version: int | str


class Asked(NamedTuple):
    """What a source asks of a reader: its name and keys and, for files of tokens, the id that ends
    a text. `only_ids`: only rows that have an id, without their data.
    """

    source: str
    text_key: str
    token_dtype: str = ""
    end_of_text: int | None = None
    only_ids: bool = False


class Row(NamedTuple):
    """One document as stored in its file: UTF-8, or token ids [n]. `end`: how far the reader is in
    the file. `place`: how messages name it. `wrong`: why there is no data.
    """

    key: str
    data: Data | np.ndarray
    end: int
    place: str
    wrong: str = ""
    has_id: bool = False

    def with_id(self, value: Any) -> Row:
        """The row with its own id as key, if `value` is a string or an integer."""
        is_name = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        return self._replace(key=str(value), has_id=True) if is_name else self


class Opened(NamedTuple):
    """A file being read: its decompressed bytes, and how many of the file's own bytes are read."""

    stream: IO[bytes]
    file: File
    position: Callable[[], int]

    def whole(self, asked: Asked) -> bytes:
        """All bytes, as one document.

        Raises:
          UserError: there are more than MOST.
        """
        return limited(self.stream.read(MOST + 1), str(self.file.path), asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """`endings`: endings of file names. `packs`: they may be followed by .gz or .zst. `has_ids`:
    documents may have an id. `has_tokens`: the rows are token ids.
    """

    endings: ClassVar[tuple[str, ...]]
    packs: ClassVar[bool] = False
    has_ids: ClassVar[bool] = True
    has_tokens: ClassVar[bool] = False

    def problem(self) -> str | None:
        """None: a reader has no options that could be wrong."""
        return None

    def members(self, folder: Path) -> list[Path] | None:
        """The files of a folder that is one data set of this kind, in order; None if it is not.

        Raises:
          UserError: it holds several data sets.
        """
        del folder
        return None

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        """Every document of a file, in order.

        Raises:
          UserError: a row has no text under the key, or a document exceeds the limit.
        """
        raise NotImplementedError


def find(name: str) -> Reader | None:
    """The reader for files of this name; None if there is none."""
    plain = name
    for ending in PACKED:
        plain = plain.removesuffix(ending)
    return next(
        (r for r in every() if plain.endswith(r.endings) and (r.packs or plain == name)), None
    )


@functools.cache
def every() -> tuple[Reader, ...]:
    """One instance of each reader, including those of installed packages."""
    return tuple(READERS.create(name, "readers") for name in READERS.names())


def known() -> str:
    """The endings of all readers, for messages."""
    whole = sorted(e for r in every() for e in r.endings)
    packs = sorted(e for r in every() for e in r.endings if r.packs)
    return f"{' '.join(whole)} ({' '.join(packs)} also followed by .gz or .zst)"


def rows(file: File, asked: Asked) -> Iterator[Row]:
    """Every document of a file, in order.

    Raises:
      UserError: a mistake in the configuration, or whatever the library that reads the file raises.
    """
    with files.one_line(f"cannot read {file.path} of data.sources.{asked.source}"):
        reader = find(file.name)
        assert reader is not None, file.name  # lm/data/sources.py lists no others
        with file.path.open("rb") as raw, _unpacked(raw, file.name) as stream:
            yield from reader.rows(Opened(stream, file, raw.tell), asked)


@contextlib.contextmanager
def _unpacked(raw: IO[bytes], name: str) -> Iterator[Any]:
    if name.endswith(".gz"):
        yield gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        arrow = package("pyarrow", f"{name} is packed by zstd")
        unpacked: Any = arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd")
        yield io.BufferedReader(unpacked, 1 << 20)
    else:
        yield raw


def limited(data: bytes, place: str, asked: Asked) -> bytes:
    """The same bytes, if they do not exceed the limit for one document.

    Raises:
      UserError: they do.
    """
    if len(data) > MOST:
        raise UserError(
            f"{place} of data.sources.{asked.source} has more than {MOST:,} bytes, the limit for "
            "one document; divide it"
        )
    return data


def package(name: str, why: str) -> Any:
    """Imports a package that not every installation has.

    Raises:
      UserError: it is not installed.
    """
    top = name.partition(".")[0]
    try:
        return [importlib.import_module(part) for part in (top, name)][-1]
    except ImportError as error:
        raise UserError(f"{why} and {top} is missing; {extras.command(_EXTRA[top])}") from error
