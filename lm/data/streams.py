"""Data sets of the Hugging Face hub, streamed by `datasets` and read once, into the store.

    datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT, for example datasets:allenai/c4:en:train

NAME may be a local folder. Only `max_tokens` are read, and no file of the data set is kept. The
tokens are found again by the path, even if the data set on the hub has changed since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from lm import files
from lm.config import UserError
from lm.readers import Asked, Row, _records, package

PREFIX = "datasets:"


@dataclasses.dataclass(frozen=True)
class Stream:
    """`config` is "" if the data set has only one."""

    name: str
    config: str
    split: str

    def __str__(self) -> str:
        return PREFIX + ":".join(filter(None, (self.name, self.config, self.split)))

    def rows(self, asked: Asked) -> Iterator[Row]:
        """All documents, in the order of the data set.

        Raises:
          UserError: the package is missing, or the data set cannot be read or has no text there.
        """
        datasets = package("datasets", f"{self} is streamed")
        with files.one_line(f"cannot read {self} of data.sources.{asked.source}"):
            found = datasets.load_dataset(
                self.name, self.config or None, split=self.split, streaming=True
            )
            for number, record in enumerate(found, start=1):
                row = Row(f"{self}:{number}", b"", 0, f"{self}: row {number}")
                assert isinstance(record, Mapping)
                yield _records.of(dict(record), row, asked)


def parse(path: str, where: str) -> Stream:
    """The stream that a path names.

    Raises:
      UserError: the path has another form.
    """
    parts = path.removeprefix(PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(
            f"{where}: write datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT, for example "
            "datasets:allenai/c4:en:train"
        )
    return Stream(parts[0], parts[1] if len(parts) == 3 else "", parts[-1])
