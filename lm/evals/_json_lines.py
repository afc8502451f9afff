"""Lines of JSON in .jsonl and .jsonl.gz files, each with its place for error messages."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from lm.config import UserError, nearest
from lm.data import sources
from lm.files import one_line

ENDS = (".jsonl", ".jsonl.gz")
_NAMES = {str: "a string", int: "an integer", dict: "an object"}


class Line(NamedTuple):
    """An object, and the place "FILE:LINE" where it stands."""

    place: str
    record: dict[str, Any]

    def text(self, key: str) -> str:
        """The string under a key."""
        return self._of(self.record, key, str)

    def number(self, key: str) -> int:
        """The integer under a key."""
        return self._of(self.record, key, int)

    def inner(self, key: str) -> Line:
        """The object under a key, at the same place."""
        return Line(self.place, self._of(self.record, key, dict))

    def _of(self, record: dict[str, Any], key: str, kind: type) -> Any:
        if key not in record:
            raise UserError(f"{self.place} has no key {key!r}; {nearest(key, record)}")
        value = record[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            message = type(value).__name__
            raise UserError(f"{self.place}: {key!r} is a {message}; it must be {_NAMES[kind]}")
        if isinstance(value, str) and not _is_unicode(value):
            raise UserError(f"{self.place}: {key!r} holds a lone surrogate, which is not text")
        return value


def files(path: str) -> list[Path]:
    """The files that match a path or glob (`~` allowed), sorted.

    Raises:
      UserError: there are none, or a name has another ending.
    """
    with one_line(f"path={path!r}"):
        found = sources.matches(path, sources.LeftOut())[1]
    if not found:
        raise UserError(f"path={path!r} matches no file (relative to {os.getcwd()})")
    for file in found:
        if file.is_dir() or not file.name.endswith(ENDS):
            raise UserError(f"{file} is not one of *{', *'.join(ENDS)}; narrow path={path!r}")
    return found


def read(file: Path) -> list[Line]:
    """Every line of a file that is not blank.

    Raises:
      UserError: the file cannot be read or is empty, or a line is not a JSON object.
    """
    with one_line(f"cannot read {file}"):
        data = file.read_bytes()
        data = gzip.decompress(data) if file.name.endswith(".gz") else data
    return lines(str(file), io.BytesIO(data))


def lines(name: str, stream: IO[bytes]) -> list[Line]:
    """As `read`, for a file that is already open; `name` names it in error messages."""
    found = []
    for number, raw in enumerate(stream, start=1):
        if not raw.strip():
            continue
        place = f"{name}:{number}"
        with one_line(f"{place} is not JSON", "mend or remove the line"):
            record = json.loads(str(raw, "utf-8-sig"))
        if not isinstance(record, dict):
            raise UserError(f"{place} is a {type(record).__name__}; a line must be an object")
        found.append(Line(place, record))
    if not found:
        raise UserError(f"{name} is empty; set path to another file")
    return found


def spread[T](values: Sequence[T], most: int) -> list[T]:
    """At most `most` of the values, evenly spread; 0: all of them.

    >>> spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    num = min(most or len(values), len(values))
    return [values[i * len(values) // num] for i in range(num)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True
