"""The grid under every study: each cell is worked on once, even if processes die, and its result is
used only for the same question.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lm.config import UserError
from lm.studies import grid
from lm.studies.grid import Entry, Grid
from tests.lm.launched import ROOT
from tests.lm.studies import grid_process
from tests.lm.studies.grid_process import CELLS, LEFT, At, Found, create, logged


def start(folder: Path, hangs_at: At | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.lm.studies.grid_process", str(folder)]
    command += [grid.name(hangs_at)] if hangs_at else []
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], folder: Path, lines: int) -> None:
    while len(logged(folder)) < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def worked(cells: Grid[At, Found], names: list[str], **options: Any) -> Any:
    """Runs the grid. Appends the names of the cells that are worked on to `names`."""

    def work(cell: At, place: Path) -> Found | None:
        names.append(place.name)
        return None if place.name == options.get("stops_at") else Found(cell.size**2)

    return grid.run(cells, work, options.get("left", grid.all_of(cells)))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_killed_process_loses_only_its_cell(tmp_path: Path) -> None:
    """After SIGKILL in a cell, the cells before it are kept. The next work on that cell finds the
    files that were left in it.
    """
    begun = CELLS[2]
    process = start(tmp_path, hangs_at=begun)
    until(process, tmp_path, 5)  # two are done, the third has begun
    process.kill()
    process.communicate()
    cells = create(tmp_path)
    assert list(grid.read(cells)) == CELLS[:2]
    assert (cells.place(begun) / LEFT).read_text() == "half done"
    names: list[str] = []
    assert worked(cells, names) == {cell: Found(cell.size**2) for cell in CELLS}
    assert names == [grid.name(cell) for cell in CELLS[2:]]
    assert list(worked(cells, names)) == CELLS
    assert len(names) == len(CELLS) - 2, "a second time there is nothing to do"


def test_processes_share_a_grid(tmp_path: Path) -> None:
    """Each cell is worked on once, and every process gets all outcomes. The cell of a process that
    is killed goes to another one.
    """
    one = start(tmp_path, hangs_at=CELLS[2])
    until(one, tmp_path, 5)
    others = [start(tmp_path), start(tmp_path)]
    until(one, tmp_path, 5 + 2 * (len(CELLS) - 3))  # all but one are done
    one.kill()
    one.communicate()
    for other in others:
        _, err = other.communicate()
        assert other.returncode == 0, err
    ended = [(name, int(pid)) for word, name, pid in logged(tmp_path) if word == "end"]
    assert sorted(name for name, _ in ended) == sorted(grid.name(cell) for cell in CELLS)
    assert [name for name, pid in ended if pid == one.pid] == [grid.name(c) for c in CELLS[:2]]
    begun = [name for word, name, _ in logged(tmp_path) if word == "begin"]
    assert sorted(begun) == sorted([grid.name(cell) for cell in (*CELLS, CELLS[2])])


def test_a_cell_that_another_process_works_on_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wait is reported once. The outcome is taken as soon as it is written."""
    cells = create(tmp_path, asked=dict(list(create(tmp_path).asked.items())[:1]))
    other, waits = contextlib.ExitStack(), iter(range(3))
    assert other.enter_context(grid._held(cells.place(CELLS[0])))

    def sleep(seconds: float) -> None:
        assert seconds == grid.WAIT_SECONDS
        if next(waits) == 2:
            grid._write(cells, CELLS[0], Found(0))
            other.close()

    monkeypatch.setattr(time, "sleep", sleep)
    names: list[str] = []
    assert worked(cells, names) == {CELLS[0]: Found(0)}
    assert not names
    assert lines(capsys) == ["[1/1] a-0-0.5  another process works on it; waiting"]


def test_another_question_is_refused_before_any_work(tmp_path: Path) -> None:
    names: list[str] = []
    worked(create(tmp_path), names)
    last = CELLS[-1]
    other = dict(create(tmp_path).asked) | {last: {"size": {"of": 9}, "label": last.label}}
    (create(tmp_path).place(CELLS[0]) / grid.FILE).unlink()
    names.clear()
    with pytest.raises(UserError) as caught:
        worked(create(tmp_path, asked=other), names)
    message = str(caught.value)
    assert "b+c-3-0.5/cell.json was made with another config (size.of: 3 -> 9)" in message
    assert "\n" not in message
    assert not names
    again = create(tmp_path, asked=other, if_changed="again")
    assert len(worked(again, names)) == len(CELLS)
    assert names == ["a-0-0.5", "b+c-3-0.5"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"asked": {}}',
        '{"asked": 3, "outcome": {"square": 1}}',
        '{"asked": {}, "outcome": {"cube": 1}}',
    ],
)
def test_a_damaged_cell_is_named_before_any_work(tmp_path: Path, text: str) -> None:
    cells, names = create(tmp_path), []
    place = cells.place(CELLS[-1])
    place.mkdir(parents=True)
    (place / grid.FILE).write_text(text)
    with pytest.raises(UserError, match=r"b\+c-3-0\.5/cell\.json is damaged; remove it"):
        worked(cells, names)
    assert not names


def test_cells_of_a_committed_table_are_not_worked_on(tmp_path: Path) -> None:
    """The table holds half of the grid, made elsewhere, and a cell that is not in this grid."""
    names: list[str] = []
    other = Entry("z-1", "0" * 16, Found(7))
    there = create(tmp_path / "there", table=[other])
    half = worked(there, names, left=lambda found: [c for c in CELLS[:4] if c not in found])
    table = tmp_path / "study.json"
    table.write_text(json.dumps({"cells": grid.entries(there, half)}))

    names.clear()
    here = create(tmp_path / "here", table=grid.read_table(table, Found))
    found = worked(here, names)
    assert names == [grid.name(cell) for cell in CELLS[4:]]
    assert found == {cell: Found(cell.size**2) for cell in CELLS}
    kept = grid.entries(here, found)
    assert [entry["name"] for entry in kept] == [*map(grid.name, CELLS), "z-1"]
    assert kept[-1] == {"name": "z-1", "digest": "0" * 16, "outcome": {"square": 7}}

    names.clear()
    asked = dict(here.asked) | {CELLS[0]: {"size": {"of": 0}, "label": "other"}}
    changed = create(tmp_path / "new", table=here.table, asked=asked)
    worked(changed, names)
    assert names == [grid.name(cell) for cell in (CELLS[0], *CELLS[4:])], "another question"


@pytest.mark.parametrize("text", ["{}", "{", '{"cells": [{"name": "a"}]}'])
def test_a_file_that_is_not_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json has no cells of such a study"):
        grid.read_table(tmp_path / "a.json", Found)
    with pytest.raises(UserError, match="No such file"):
        grid.read_table(tmp_path / "b.json", Found)


def test_what_is_left_may_depend_on_what_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For each label, sizes are tried until one has a square above 0. A work that is stopped ends
    the grid at once.
    """

    def left(found: Mapping[At, Found]) -> list[At]:
        wanted = []
        for label in ("a", "b,c"):
            own = [cell for cell in CELLS if cell.label == label]
            done = [cell for cell in own if cell in found]
            if not any(found[cell].square for cell in done):
                wanted.append(own[len(done)])
        return wanted

    names: list[str] = []
    assert worked(create(tmp_path), names, left=left, stops_at="b+c-0-0.5") is None
    assert names == ["a-0-0.5", "a-1-0.5", "b+c-0-0.5"]
    assert [line.split()[0] for line in lines(capsys)] == ["[1/2]", "[2/3]", "[3/3]"]
    found = worked(create(tmp_path), names, left=left)
    assert names[3:] == ["b+c-0-0.5", "b+c-1-0.5"]
    assert [cell.size for cell in found] == [0, 1, 0, 1]


def test_names_of_cells_are_file_names_and_differ() -> None:
    grid.check_names(CELLS)
    with pytest.raises(UserError, match=r"share the folder a-1-0\.5"):
        grid.check_names([At("a", 1, 0.5), At("a", 1, 0.50000001)])
    for bad in ("a/b", "", "a\n"):
        with pytest.raises(UserError, match="is to be part of a file's name"):
            grid.check_names([At(bad, 1, 0.5)])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cells").write_text("")
    with pytest.raises(UserError, match="Not a directory; a file is in the way: move it away"):
        grid_process.main(tmp_path, "")
