"""Readers: a kind of file -> its documents; one file each, found by listing this folder.

    name of the file -> the reader one of whose `endings` it has
    file -> bytes, unpacked where the name goes on with .gz or .zst -> rows(opened, asked) -> Row

A reader yields every document that a file should hold, also those that are damaged: a row says what
is wrong with it, and is counted. A key that is not there, or holds something else than text, is a
mistake of the configuration and raised at once. What a library raises becomes one line here.
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

MOST = 1 << 31  # bytes of a document, or of the line or file of JSON that holds it
EMPTY, UNDECODABLE, NOT_JSON = "empty", "undecodable", "not JSON"  # why left out
PACKED = (".gz", ".zst")
_EXTRA = {"datasets": "stream", "fsspec": "data", "pyarrow": "data"}  # that a package is in

Data = bytes | bytearray | memoryview


class Place(Protocol):
    """Where a file lies; a `Path` is one. `str()` of it is what messages show."""

    def open(self, mode: str = "rb", /) -> Any: ...


class File(NamedTuple):
    """`name`: relative to the root, with forward slashes. `version` differs once the content does:
    of a local file the time of its last change in nanoseconds.
    """

    path: Any
    name: str
    size: int
    version: int | str


class Asked(NamedTuple):
    """What a source asks: its name and keys, of tokens the id that ends a text; `only_ids`: rows
    that have an id, without their data.
    """

    source: str
    text_key: str
    token_dtype: str = ""
    end_of_text: int | None = None
    only_ids: bool = False


class Row(NamedTuple):
    """One document as its file holds it: UTF-8, or token ids [n]. `end`: where the reader stands in
    the file then; `place` is what messages show. `wrong` says why there are no data.
    """

    key: str
    data: Data | np.ndarray
    end: int
    place: str
    wrong: str = ""
    has_id: bool = False

    def with_id(self, value: Any) -> Row:
        """The row under its own id, where `value` is a string or an integer."""
        is_name = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        return self._replace(key=str(value), has_id=True) if is_name else self


class Opened(NamedTuple):
    """A file that is read: its bytes, unpacked, and how many of the file's own are read so far."""

    stream: IO[bytes]
    file: File
    position: Callable[[], int]

    def whole(self, asked: Asked) -> bytes:
        """All bytes, as one document.

        Raises:
          UserError: they are more than MOST.
        """
        return limited(self.stream.read(MOST + 1), str(self.file.path), asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """`endings` of names; `packs`: also with .gz or .zst behind; `has_ids`: a document may have an
    id; `has_tokens`: the rows are token ids.
    """

    endings: ClassVar[tuple[str, ...]]
    packs: ClassVar[bool] = False
    has_ids: ClassVar[bool] = True
    has_tokens: ClassVar[bool] = False

    def problem(self) -> str | None:
        """A reader has no options that could be wrong."""
        return None

    def members(self, folder: Path) -> list[Path] | None:
        """The files of a folder that is one data set of this kind, in order; None: it is not.

        Raises:
          UserError: it holds several data sets.
        """
        del folder
        return None

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        """Every document of a file, in order.

        Raises:
          UserError: no text under the key that is asked for; a document over the limit.
        """
        raise NotImplementedError


def find(name: str) -> Reader | None:
    """The reader of files of this name."""
    plain = name
    for ending in PACKED:
        plain = plain.removesuffix(ending)
    return next(
        (r for r in every() if plain.endswith(r.endings) and (r.packs or plain == name)), None
    )


@functools.cache
def every() -> tuple[Reader, ...]:
    """One of each reader, also those of installed packages."""
    return tuple(READERS.create(name, "readers") for name in READERS.names())


def known() -> str:
    """The endings of all readers, for messages."""
    whole = sorted(e for r in every() for e in r.endings)
    packs = sorted(e for r in every() for e in r.endings if r.packs)
    return f"{' '.join(whole)} ({' '.join(packs)} also with .gz or .zst behind)"


def rows(file: File, asked: Asked) -> Iterator[Row]:
    """Every document of a file, in order.

    Raises:
      UserError: a mistake of the configuration, or whatever the library that reads the file raised.
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
    """The same bytes, if they are not more than one document may have.

    Raises:
      UserError: they are.
    """
    if len(data) > MOST:
        raise UserError(
            f"{place} of data.sources.{asked.source} has more than {MOST:,} bytes, the most of one "
            "document; divide it"
        )
    return data


def package(name: str, why: str) -> Any:
    """A package that not every installation has.

    Raises:
      UserError: it is not installed.
    """
    top = name.partition(".")[0]
    try:
        return [importlib.import_module(part) for part in (top, name)][-1]
    except ImportError as error:
        raise UserError(f"{why} and {top} is missing; {extras.command(_EXTRA[top])}") from error
