"""Tables of trainings: a file of JSON lines, CSV or Parquet -> columns, checked.

A row is a training at the end of a decay; the columns are those of `espalier sweep`. What a law
needs that follows from others is added: `compute` = 6 body_parameters tokens,
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
    """`columns`: name -> values [rows], float64 (NaN: none) or text. `left_out`: a sentence for
    each group of rows that the table does not hand on.
    """

    name: str
    columns: Mapping[str, np.ndarray]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, places: np.ndarray) -> Table:
        """The rows at these places, or where a mask holds."""
        return dataclasses.replace(self, columns={k: v[places] for k, v in self.columns.items()})

    def finished(self, needed: Collection[str]) -> Table:
        """The rows that are done, checked: every needed column is there and has a positive number
        in each of them. A table without a column `status` is done where it has a loss.

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
        told = list(self.left_out)
        if count := int(np.sum(~is_done)):
            kinds = ", ".join(sorted({str(x) for x in self.columns["status"][~is_done]}))
            told.append(f"{count} of {len(self)} rows are not done ({kinds})")
        if not is_done.any():
            raise UserError(f"{self.name} has no row with status={DONE!r}; finish the sweep first")
        return dataclasses.replace(self.take(is_done), left_out=tuple(told))

    def diverged(self) -> Table | None:
        """The rows whose status says so; None of a table without that column."""
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
            raise UserError(f"{self.name}: {column}={word!r} is not a number; mend that row")

    def _check_numbers(self, needed: Collection[str], is_done: np.ndarray) -> None:
        for column in needed:
            values = self.columns[column]
            wrong = is_done & ~(np.isfinite(values) & (values > 0))
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise UserError(
                    f"{self.name}: {column}={values[row]} in row {row + 1}, which is done; it must "
                    "be a positive number: mend the row, or set its status to 'diverged'"
                )


def read(path: Path, renamed: Mapping[str, str] | None = None) -> Table:
    """A table from its file, by the ending of its name. `renamed`: a column of ours -> its name in
    the file.

    Raises:
      UserError: another ending, a file that cannot be read or holds no row, a name that it lacks.
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
    """The columns, and those that follow from them."""
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
    import pyarrow.parquet as pq  # of the extra "data"

    return pq.read_table(path).to_pylist()


_READERS = {".jsonl": _read_lines, ".csv": _read_csv, ".parquet": _read_parquet}


def _column(values: Sequence[Any]) -> np.ndarray:
    """float64 with NaN for what is absent, or text where one value is not a number."""
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
    """A row by what tells it apart: "width=64, tokens=1e+06"."""
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(f"{name}={shown(columns[name][row])}" for name in names if name in columns)
