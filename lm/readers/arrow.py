"""Arrow as saved by Hugging Face's `datasets`: one document per row, the text in column `text_key`.

A folder written by `Dataset.save_to_disk` is a source; its state.json lists the files. A folder
written by `DatasetDict.save_to_disk` holds one such folder per split. `datasets` writes Arrow's
streaming format; the file format (Feather) can be read too. This needs neither a network nor the
package `datasets`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm import files
from lm.mapping import UserError
from lm.readers import Asked, Opened, Reader, Row, _columns, package

_MAGIC = b"ARROW1"  # of the file format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrow(Reader):
    """A document's key is its `id`, or else the name of the file and the number of the row."""

    endings = (".arrow", ".feather")

    def members(self, folder: Path) -> list[Path] | None:
        if (several := folder / "dataset_dict.json").is_file():
            names = files.read_json(several, "save the data set again").get("splits", [])
            places = " or ".join(str(folder / str(name)) for name in names)
            raise UserError(f"{folder} holds several data sets; set path to {places}")
        if not (state := folder / "state.json").is_file():
            return None
        with files.one_line(f"cannot read {state}", "save the data set again"):
            found = files.read_json(state, "save the data set again")
            return [folder / entry["filename"] for entry in found["_data_files"]]

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        file, ipc = opened.file, package("pyarrow.ipc", f"{opened.file.path} is Arrow")
        is_file = opened.stream.read(len(_MAGIC)) == _MAGIC
        opened.stream.seek(0)
        with (ipc.open_file if is_file else ipc.open_stream)(opened.stream) as table:
            if columns := _columns.wanted(table.schema, file, asked):
                batches: Any = (
                    map(table.get_batch, range(table.num_record_batches)) if is_file else table
                )
                end = lambda number: min(file.size, opened.position())
                yield from _columns.rows(batches, columns, file, asked, end)
