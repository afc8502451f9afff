"""A process that works on a grid, for test_grid.py.

    python -m tests.lm.studies.grid_process FOLDER [CELL]

In CELL it hangs. The work on a cell appends a line to FOLDER/log when it begins and when it ends.
In between it leaves a file in the cell's folder.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from lm.studies import grid
from lm.studies.grid import Grid


class At(NamedTuple):
    label: str
    size: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Found:
    square: int


CELLS = [At(label, size, 0.5) for label in ("a", "b,c") for size in range(4)]
LEFT = "left.txt"


def create(folder: Path, **changes: Any) -> Grid[At, Found]:
    asked = {cell: {"size": {"of": cell.size}, "label": cell.label} for cell in CELLS}
    return Grid(**({"folder": folder / "cells", "outcome": Found, "asked": asked} | changes))


def log(folder: Path, line: str) -> None:
    with open(folder / "log", "a") as file:
        file.write(f"{line}\n")


def logged(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def main(folder: Path, hangs_at: str) -> dict[At, Found] | None:
    def work(cell: At, place: Path) -> Found:
        log(folder, f"begin {grid.name(cell)} {os.getpid()}")
        (place / LEFT).write_text("half done")
        time.sleep(60 if place.name == hangs_at else 0.05)
        log(folder, f"end {grid.name(cell)} {os.getpid()}")
        return Found(cell.size**2)

    cells = create(folder)
    return grid.run(cells, work, grid.all_of(cells))


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), "".join(sys.argv[2:]))
    assert found == {cell: Found(cell.size**2) for cell in CELLS}
