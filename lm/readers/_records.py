"""JSON records: objects with the text of a document under one key, and possibly its `id`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from lm.mapping import UserError, nearest
from lm.readers import MOST, NOT_JSON, UNDECODABLE, Asked, Opened, Row, _long_lines, limited


def lines(opened: Opened, asked: Asked, first: bytes = b"") -> Iterator[Row]:
    """One document per line; `first` is what was already read of the file."""
    number, file = 0, opened.file
    while line := first or opened.stream.readline(MOST + 1):
        first = b""
        number += 1
        place = f"{file.path}:{number}"
        limited(line, place, asked)
        if line.strip() and not (asked.only_ids and b'"id"' not in line):
            found = _line(line, Row(f"{file.name}:{number}", b"", opened.position(), place), asked)
            if found.has_id or not asked.only_ids:
                yield found


def _line(line: bytes, row: Row, asked: Asked) -> Row:
    try:
        record = _long_lines.loads(line.removeprefix(codecs.BOM_UTF8), asked.text_key)
    except UnicodeError:
        return row._replace(wrong=UNDECODABLE)
    except (ValueError, RecursionError):  # nested too deeply, or a number of thousands of digits
        return row._replace(wrong=NOT_JSON)
    if not isinstance(record, dict):
        raise UserError(
            f"{row.place} of data.sources.{asked.source} is a {type(record).__name__}; a line must "
            "be an object"
        )
    return of(record, row, asked)


def of(record: dict[str, Any], row: Row, asked: Asked) -> Row:
    """The row of a JSON object.

    Raises:
      UserError: it has no text under the key.
    """
    text_key, name = asked.text_key, asked.source
    if text_key not in record:
        raise UserError(
            f"{row.place} has no key {text_key!r} (data.sources.{name}.text_key); "
            f"{nearest(text_key, record)}"
        )
    text = "" if record[text_key] is None else record[text_key]
    if isinstance(text, str):
        try:
            text = text.encode()
        except UnicodeError:  # JSON can escape a lone surrogate
            text, row = b"", row._replace(wrong=UNDECODABLE)
    if not isinstance(text, bytes | bytearray):
        raise UserError(
            f"{row.place}: {text_key!r} (data.sources.{name}.text_key) is a {type(text).__name__}; "
            "it must be a string"
        )
    return row._replace(data=text).with_id(record.get("id"))
