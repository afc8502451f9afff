"""The table of a sweep: a flat row per cell, as JSON lines and, with pyarrow, as Parquet.

    {"cell": "1f0c...", "trunk": "9a3e...", "seed": 0, "learning_rate": 0.01, "batch_tokens": 4096,
     "tokens": 1003520, "steps": 245, "width": 64, ..., "loss": 3.91, "status": "done"}

A row stands for its cell: `cell` is the digest of everything that its outcome depends on, so a cell
that is in a table is not run again, on whichever machines the table grows. `loss` is the mean over
the validation sets, in nats per token; None for a cell that diverged. A key that an axis of the
sweep sets has its own column, named by the dotted key.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lm import files
from lm.config import UserError, convert
from lm.families import SCHEDULES
from lm.mapping import to_mapping
from lm.studies.cells import Cell, Planned
from lm.studies.grid import Entry

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a cell. `losses`, by validation set, are in nats per token, empty if it
    diverged. `skipped` counts steps. `seconds` are those of this cell and of the part of the trunk
    that was trained for it. `body_parameters` are those without embedding and head.
    """

    status: Literal["done", "diverged"]
    losses: Mapping[str, float]
    skipped: int
    seconds: float
    parameters: int
    body_parameters: int
    commit: str
    cpu: str

    @property
    def loss(self) -> float | None:
        """The mean over the validation sets."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


# The columns that every reader relies on.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("cell", "trunk", "schedule", "mixer", "status"), str),
    **dict.fromkeys(("seed", "batch_tokens", "tokens", "steps", "width"), int),
    "learning_rate": int | float,
}
_FIELDS = tuple(field.name for field in dataclasses.fields(Outcome) if field.name != "losses")


def row(cell: Cell, planned: Planned, outcome: Outcome) -> Row:
    """The row of a finished cell."""
    config = planned.config
    found = {
        "cell": cell.digest,
        "trunk": cell.trunk,
        "seed": config.seed,
        "learning_rate": config.schedule.peak_learning_rate,
        "batch_tokens": config.tokens_per_step,
        "tokens": config.run_tokens,
        "steps": config.run_steps,
        "width": config.model.width,
        "layers": config.model.num_layers,
        "vocab": config.data.tokenizer.vocab_size,
        "context": config.data.context_length,
        "mixer": _text(config.model.pattern),
        "schedule": SCHEDULES.name_of(type(config.schedule)),
        "loss": outcome.loss,
    }
    found |= {name: getattr(outcome, name) for name in _FIELDS}
    if len(outcome.losses) > 1:
        found |= {f"loss/{name}": value for name, value in outcome.losses.items()}
    swept = {key: _text(value) for key, value in planned.values.items()}
    return found | {key: value for key, value in swept.items() if key not in found}


def _text(value: Any) -> Any:
    """A number, or text for anything else: a column of Parquet holds one kind."""
    if isinstance(value, bool | int | float | str):
        return value
    return json.dumps(to_mapping(value))


def entries(rows: Iterable[Row]) -> list[Entry[Outcome]]:
    """Rows as finished cells of a grid."""
    found = []
    for one in rows:
        losses = {k.partition("/")[2]: x for k, x in one.items() if k.startswith("loss/")}
        losses = {k: x for k, x in losses.items() if x is not None}
        if not losses and one["loss"] is not None:
            losses = {"": one["loss"]}
        values = {name: one[name] for name in _FIELDS} | {"losses": losses}
        outcome = convert(Outcome, values, f"cell {one['cell']}")
        found.append(Entry(one["cell"], one["cell"], outcome))
    return found


def merged(new: Sequence[Row], old: Iterable[Row]) -> list[Row]:
    """The rows of a growing table: those found, then those of the table that do not belong to a
    cell of the present grid.
    """
    known = {one["cell"] for one in new}
    return [*new, *(one for one in old if one["cell"] not in known)]


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes JSON lines to `path`, and beside it the same as .parquet if pyarrow is installed."""
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in rows)
    files.replace(path, text)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return
    names = list(dict.fromkeys(key for one in rows for key in one))
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table({x: _column([r.get(x) for r in rows]) for x in names}), buffer)
    files.replace(path.with_suffix(".parquet"), buffer.getvalue().to_pybytes())


def _column(values: list[Any]) -> list[Any]:
    """All numbers of one kind, else text: two grids may put different kinds under one key."""
    given = [x for x in values if x is not None]
    if any(isinstance(x, bool | str) for x in given):
        return [None if x is None else str(x) for x in values]
    if any(isinstance(x, float) for x in given):
        return [None if x is None else float(x) for x in values]
    return values


def read(path: Path) -> list[Row]:
    """The rows of a table written by `write`, from its JSON lines.

    Raises:
      UserError: the file is missing, a line is not such a row, or two rows are of one cell.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the .jsonl table of a sweep") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not JSON lines; name the .jsonl table of a sweep") from None
    found = [_read(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    first: dict[str, int] = {}
    for number, row in enumerate(found, start=1):
        if (before := first.setdefault(row["cell"], number)) != number:
            raise UserError(
                f"{path}:{number} and line {before} are of one cell, {row['cell']}; remove one"
            )
    return found


def _read(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
        is_row = all(isinstance(found[key], kind) for key, kind in _KINDS.items())
        is_row = is_row and found["learning_rate"] > 0
        is_row = is_row and (found["loss"] is None or math.isfinite(found["loss"]))
        entries([found] if is_row else [])
    except (ValueError, TypeError, KeyError, UserError):
        is_row = False
    if not is_row:
        raise UserError(f"{where} is not a row of a sweep; remove that line, or restore the table")
    return found
