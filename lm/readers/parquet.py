"""Parquet: one document per row, the text in column `text_key`. The column may hold strings or
bytes, also as dictionaries or views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lm.readers import Asked, Opened, Reader, Row, _columns, package


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(Reader):
    """A document's key is its `id`, or else the name of the file and the number of the row."""

    endings = (".parquet",)

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        file = opened.file
        parquet = package("pyarrow.parquet", f"{file.path} is Parquet")
        with parquet.ParquetFile(opened.stream) as table:
            num_rows = table.metadata.num_rows
            if columns := _columns.wanted(table.schema_arrow, file, asked):
                batches = table.iter_batches(batch_size=256, columns=columns)
                end = lambda number: file.size * number // num_rows
                yield from _columns.rows(batches, columns, file, asked, end)
