"""Tables of trainings: a file of JSON lines, CSV or Parquet -> columns, checked.

A row is a training at the end of a decay. The columns are those of `espalier sweep`. Columns that
laws need and that follow from others are added: `compute` = 6 body_parameters tokens,
`tokens_per_parameter` = tokens / body_parameters.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import files
from lm.mapping import UserError, nearest

DONE = "done"
KINDS = (".jsonl", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Table:
    """`columns`: name -> values [rows], float64 (NaN: missing) or text. `left_out` has one sentence
    for each group of rows that is not in the table.
    """

    name: str
    columns: Mapping[str, np.ndarray]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, places: np.ndarray) -> Table:
        """The rows at these indices, or where a mask is true."""
        return dataclasses.replace(self, columns={k: v[places] for k, v in self.columns.items()})

    def finished(self, needed: Collection[str]) -> Table:
        """The finished rows, checked: every needed column exists and has a positive number in each
        row. In a table without a column `status`, a row with a loss is finished.

        Raises:
          UserError: a column is missing, a value is not a number, or not positive; no row is done.
        """
        for column in needed:
            self._check_column(column)
        if "status" in self.columns:
            is_done = self.columns["status"] == DONE
        else:
            is_done = np.ones(len(self), dtype=bool)
        self._check_numbers(needed, is_done)
        notes = list(self.left_out)
        if count := int(np.sum(~is_done)):
            kinds = ", ".join(sorted({str(x) for x in self.columns["status"][~is_done]}))
            notes.append(f"{count} of {len(self)} rows are not done ({kinds})")
        if not is_done.any():
            raise UserError(f"{self.name} has no row with status={DONE!r}; finish the sweep first")
        return dataclasses.replace(self.take(is_done), left_out=tuple(notes))

    def diverged(self) -> Table | None:
        """The rows with status "diverged"; None if the table has no column `status`."""
        if "status" not in self.columns:
            return None
        return self.take(self.columns["status"] == "diverged")

    def _check_column(self, column: str) -> None:
        if column not in self.columns:
            near = nearest(column, self.columns)
            raise UserError(
                f"{self.name} has no column {column!r} ({near}); another name is given by "
                f"--column={column}=NAME"
            )
        if self.columns[column].dtype.kind != "f":
            word = next(str(x) for x in self.columns[column] if not _is_number(x))
            raise UserError(f"{self.name}: {column}={word!r} is not a number; correct that row")

    def _check_numbers(self, needed: Collection[str], is_done: np.ndarray) -> None:
        for column in needed:
            values = self.columns[column]
            wrong = is_done & ~(np.isfinite(values) & (values > 0))
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise UserError(
                    f"{self.name}: {column}={values[row]} in row {row + 1}, which is done; it must "
                    "be a positive number: correct the row, or set its status to 'diverged'"
                )


def read(path: Path, renamed: Mapping[str, str] | None = None) -> Table:
    """A table from its file, whose kind is given by its suffix. `renamed` maps a column's name here
    to its name in the file.

    Raises:
      UserError: an unknown suffix, an unreadable file, a file without rows, or a missing column.
    """
    if path.suffix not in KINDS:
        raise UserError(f"{path} ends in {path.suffix!r}; a table is one of {', '.join(KINDS)}")
    with files.one_line(f"cannot read {path}", "give a table of trainings"):
        rows = _READERS[path.suffix](path)
    if not rows:
        raise UserError(f"{path} holds no row; give a table of trainings")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    for ours, theirs in (renamed or {}).items():
        if theirs not in columns:
            raise UserError(f"--column={ours}={theirs}: {path} has {nearest(theirs, columns)}")
        columns[ours] = columns[theirs]
    return Table(str(path), with_derived(columns))


def with_derived(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns, and the columns that follow from them."""
    found = dict(columns)
    both = [columns.get(name) for name in ("body_parameters", "tokens")]
    if all(column is not None and column.dtype.kind == "f" for column in both):
        size, tokens = (np.asarray(column) for column in both)
        found.setdefault("compute", 6.0 * size * tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.setdefault("tokens_per_parameter", tokens / size)
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not all(isinstance(row, dict) for row in rows):
        raise TypeError("a line is not an object")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k} for row in csv.DictReader(file)]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq  # needs the extra "data"

    return pq.read_table(path).to_pylist()


_READERS = {".jsonl": _read_lines, ".csv": _read_csv, ".parquet": _read_parquet}


def _column(values: Sequence[Any]) -> np.ndarray:
    """float64 with NaN for missing values, or text if one value is not a number."""
    values = [None if value in ("", "null", "None") else value for value in values]
    if all(value is None or _is_number(value) for value in values):
        return np.array([np.nan if value is None else float(value) for value in values])
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float)


def spoken(columns: Mapping[str, np.ndarray], row: int, names: Iterable[str]) -> str:
    """The values that identify a row: "width=64, tokens=1e+06"."""
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(f"{name}={shown(columns[name][row])}" for name in names if name in columns)
