"""JSON lines: one document per line, the text under `text_key`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lm.readers import Asked, Opened, Reader, Row, _records


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(Reader):
    """A document's key is its `id`, or else the name of the file and the number of the line."""

    endings = (".jsonl", ".ndjson")
    packs = True

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        return _records.lines(opened, asked)
