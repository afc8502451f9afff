"""Plain text: each file is one document, without its byte order mark."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterator

from lm.readers import Asked, Opened, Reader, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Reader):
    """A document's key is the name of the file."""

    endings = (".txt", ".md", ".py")
    packs = True
    has_ids = False

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        data = opened.whole(asked).removeprefix(codecs.BOM_UTF8)
        yield Row(opened.file.name, data, opened.file.size, str(opened.file.path))
