"""A grid: cells of work, each done once, whatever is killed and however many processes work on it.

    cell = its coordinates, a named tuple: Point("32", "conv,gla", 16, 0.005, 0)
    FOLDER/32-conv+gla-16-0.005-0/cell.json = {"digest", "asked", "outcome"}, written last and whole

`asked` is everything that the outcome depends on. It decides whether a finished cell answers the
present question; every cell is compared before work starts on the first. Its digest does the same
for a cell in a table, which needs no folder: a study commits its table, and nobody computes these
cells again.

Any number of processes may run the same grid in one folder. A process locks the cell it works on,
and the lock ends with the process, however that ends. What it had written to the cell's folder is
available to the process that takes the cell next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lm import files
from lm.mapping import UserError, convert, difference, to_mapping

FILE, LOCK = "cell.json", ".cell.lock"
WAIT_SECONDS = 1.0  # between looks at the cells of other processes


class Entry[O](NamedTuple):
    """A finished cell in a table."""

    name: str
    digest: str
    outcome: O


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid[C: tuple[Any, ...], O]:
    """`asked`: cell -> plain values, in the order of work. `outcome`: the frozen dataclass that
    work on a cell returns, whose values JSON can hold. `table`: cells finished elsewhere. A cell in
    the folder that was asked something else is refused, or computed again.
    """

    folder: Path
    outcome: type[O]
    asked: Mapping[C, Mapping[str, Any]]
    table: Sequence[Entry[O]] = ()
    if_changed: Literal["refuse", "again"] = "refuse"

    def place(self, cell: C) -> Path:
        """The folder of a cell."""
        return self.folder / name(cell)


def name(cell: tuple[Any, ...]) -> str:
    """The name of a cell's folder.

    >>> name(("32", "conv,gla", 16, 0.005, 0))
    '32-conv+gla-16-0.005-0'
    """
    texts = (f"{x:g}" if isinstance(x, float) else str(x) for x in cell)
    return "-".join(texts).replace(",", "+")


def digest(asked: Mapping[str, Any]) -> str:
    """A digest that is equal for equal questions, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(to_mapping(asked), sort_keys=True).encode()).hexdigest()[:16]


def check_names(cells: Sequence[tuple[Any, ...]]) -> None:
    """Refuses cells that cannot each have a folder.

    Raises:
      UserError: a coordinate cannot be part of a file's name, or two cells have the same name.
    """
    for cell in cells:
        for x in cell:
            if isinstance(x, str) and not re.fullmatch(r"[\w ,.+-]+", x):
                raise UserError(
                    f"{x!r} is to be part of a file's name; use letters, digits, spaces and "
                    ", . + - _"
                )
    again = [x for x, count in Counter(map(name, cells)).items() if count > 1]
    if again:
        raise UserError(f"two cells would share the folder {again[0]}; rename what they differ in")


def read_table[O](path: Path, outcome: type[O]) -> list[Entry[O]]:
    """The entries that `entries` wrote to a file, under "cells".

    Raises:
      UserError: the file is missing or is not such a table.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            Entry(x["name"], x["digest"], convert(outcome, x["outcome"], x["name"])) for x in values
        ]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the JSON file of a study") from None
    except (ValueError, TypeError, KeyError, UserError):
        raise UserError(f"{path} has no cells of such a study; name its JSON file") from None


def entries[C: tuple[Any, ...], O](
    grid: Grid[C, O], found: Mapping[C, O]
) -> list[dict[str, str | Any]]:
    """The plain content of a table: the cells found, then those of `grid.table` that do not belong
    to this grid.
    """
    own = [
        Entry(name(cell), digest(asked), found[cell])
        for cell, asked in grid.asked.items()
        if cell in found
    ]
    known = {entry.digest for entry in own}
    rest = [entry for entry in grid.table if entry.digest not in known]
    return [entry._asdict() | {"outcome": to_mapping(entry.outcome)} for entry in (*own, *rest)]


def read[C: tuple[Any, ...], O](grid: Grid[C, O]) -> dict[C, O]:
    """The finished cells, from the folder or else from the table, in the order of the grid.

    Raises:
      UserError: a cell's file is damaged, or it was asked something else where that is refused.
    """
    known = {entry.digest: entry.outcome for entry in grid.table}
    found = {}
    for cell, asked in grid.asked.items():
        outcome = _read(grid, cell)
        if outcome is None:
            outcome = known.get(digest(asked)) if known else None
        if outcome is not None:
            found[cell] = outcome
    return found


def all_of[C: tuple[Any, ...], O](grid: Grid[C, O]) -> Callable[[Mapping[C, O]], list[C]]:
    """The order of work for a grid whose cells are all wanted."""
    return lambda found: [cell for cell in grid.asked if cell not in found]


def run[C: tuple[Any, ...], O](
    grid: Grid[C, O],
    work: Callable[[C, Path], O | None],
    left: Callable[[Mapping[C, O]], Sequence[C]],
) -> dict[C, O] | None:
    """Every wanted cell, from the folder or the table or by `work(cell, its folder)`. `work` may
    find there what earlier work left. It returns None if it was stopped; then so does `run`.

    Args:
      left: what is found -> the cells that may be worked on now, the next one first. Of these none
        is found yet, and none of them depends on another; when it is empty, the grid is done.

    Raises:
      UserError: as `read`, before any work; or the folder cannot be written.
    """
    found, began, num_done, is_waiting = read(grid), time.monotonic(), 0, False
    while cells := left(found):
        for cell in cells:
            with _held(grid.place(cell)) as is_ours:
                if not is_ours:
                    continue
                outcome = _read(grid, cell)  # another process may have finished it meanwhile
                if outcome is None:
                    _report(found, cells, name(cell), _eta(began, num_done, len(cells)))
                    outcome = work(cell, grid.place(cell))
                    if outcome is None:
                        return None
                    _write(grid, cell, outcome)
                    num_done += 1
                found[cell], is_waiting = outcome, False
                break
        else:
            if not is_waiting:
                _report(found, cells, name(cells[0]), "another process works on it; waiting")
            is_waiting = True
            time.sleep(WAIT_SECONDS)
    return found


def _read[C: tuple[Any, ...], O](grid: Grid[C, O], cell: C) -> O | None:
    path = grid.place(cell) / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        changed = difference(values["asked"], to_mapping(grid.asked[cell]))
        outcome = convert(grid.outcome, values["outcome"], "outcome")
    except (ValueError, TypeError, KeyError, AttributeError, UserError):
        raise UserError(f"{path} is damaged; remove it to do this cell again") from None
    if not changed:
        return outcome
    if grid.if_changed == "again":
        return None
    key, (old, new) = next(iter(changed.items()))
    raise UserError(
        f"{path} was made with another config ({key}: {old!r} -> {new!r}); choose a new workdir"
    )


def _write[C: tuple[Any, ...], O](grid: Grid[C, O], cell: C, outcome: O) -> None:
    asked = to_mapping(grid.asked[cell])
    values = {"digest": digest(asked), "asked": asked, "outcome": to_mapping(outcome)}
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    files.replace(grid.place(cell) / FILE, text)


@contextlib.contextmanager
def _held(place: Path) -> Iterator[bool]:
    """Whether this process has the cell's lock, which it keeps while the body runs."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = open(place / LOCK, "a")  # noqa: SIM115 (held open for as long as the lock)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; {files.advice(error)}") from None
    with file:
        yield files.lock(file)


def _eta(began: float, num_done: int, num_left: int) -> str:
    if not num_done:
        return ""
    minutes = (time.monotonic() - began) / num_done * num_left / 60
    return f"about {minutes:,.0f} min left" if minutes >= 1 else "less than a minute left"


def _report(found: Mapping[Any, Any], cells: Sequence[Any], what: str, note: str) -> None:
    """Prints a line, and not a live bar: the work on a cell has its own."""
    counts = f"[{len(found) + 1}/{len(found) + len(cells)}]"
    print(f"{counts} {what}{'  ' if note else ''}{note}", file=sys.stderr, flush=True)
