"""JSON: an array of objects or of strings, one object, or JSON lines (as C4's .json.gz are). A file
whose first line is a complete object is read as JSON lines.

An array is read whole and takes a few times its size in memory.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from lm.mapping import UserError
from lm.readers import (
    MOST,
    NOT_JSON,
    UNDECODABLE,
    Asked,
    Opened,
    Reader,
    Row,
    _long_lines,
    _records,
    limited,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonFile(Reader):
    """A document's key is its `id`, or else the name of the file and the document's number in
    it.
    """

    endings = (".json",)
    packs = True

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        file, first = opened.file, opened.stream.readline(MOST + 1)
        while first and not first.strip():
            first = opened.stream.readline(MOST + 1)
        if not first:
            return
        if _is_object(limited(first, str(file.path), asked), asked.text_key):
            yield from _records.lines(opened, asked, first)
            return
        data = limited(first + opened.stream.read(MOST + 1), str(file.path), asked)
        row = Row(file.name, b"", file.size, str(file.path))
        try:
            value = json.loads(str(data.removeprefix(codecs.BOM_UTF8), "utf-8"))
        except UnicodeError:
            yield row._replace(wrong=UNDECODABLE)
            return
        except (ValueError, RecursionError):
            yield row._replace(wrong=NOT_JSON)
            return
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items, start=1):
            end = file.size * number // len(items)
            place = f"{file.path}: item {number}" if isinstance(value, list) else str(file.path)
            found = _item(item, Row(f"{file.name}:{number}", b"", end, place), asked)
            if found.has_id or not asked.only_ids:
                yield found


def _item(item: Any, row: Row, asked: Asked) -> Row:
    if isinstance(item, str):
        item = {asked.text_key: item}
    if not isinstance(item, dict):
        raise UserError(
            f"{row.place} of data.sources.{asked.source} is a {type(item).__name__}; it must be an "
            "object or a string"
        )
    return _records.of(item, row, asked)


def _is_object(line: bytes, text_key: str) -> bool:
    try:
        return isinstance(_long_lines.loads(line.removeprefix(codecs.BOM_UTF8), text_key), dict)
    except (ValueError, RecursionError):
        return False
