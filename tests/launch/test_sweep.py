"""launch.sweep, autolrs, lr_transfer and regret as processes: mistakes in one line, and sweeps that
are killed and shared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.studies import rows
from tests.lm import launched
from tests.lm.launched import ROOT

GRID = (
    "--grid=schedule.peak_learning_rate=0.01,0.02",
    "--grid=run.length=20 steps,40 steps",
)


def command(workdir: Path, *flags: str) -> list[str]:
    """The command of a sweep of a tiny run over four cells."""
    run = launched.arguments(**{"schedule.decay": "25 percent", "checkpoint.every": "5 steps"})
    return [sys.executable, "-m", "launch.sweep", *run, f"--workdir={workdir}", *GRID, *flags]


def losses(workdir: Path) -> dict[str, float | None]:
    return {row["cell"]: row["loss"] for row in rows.read(workdir / "sweep.jsonl")}


def refused(module: str, *flags: str) -> tuple[int, str]:
    """The exit status and stderr of a command."""
    line = [sys.executable, "-m", f"launch.{module}", *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("sweep", ["--draw_only"], "--draw_only needs --table; name the table to draw"),
        ("sweep", ["--grid=seed=1"], "--config is missing; name the file of a run or of a sweep"),
        ("regret", [], "which table? name one: espalier regret SWEEP.jsonl"),
        ("regret", ["none.jsonl"], "none.jsonl: No such file or directory; name the .jsonl table"),
        ("regret", ["x", "--tuned_on=a"], "--tuned_on=a is not a list of seeds, as 0,1"),
        ("regret", ["x", "--tuned_on=²"], "--tuned_on=² is not a list of seeds, as 0,1"),
        ("regret", ["x", "--figure=x.png"], "--figure=x.png does not end in .svg, which is what"),
        ("regret", ["EMPTY"], "no row has schedule 'power'; the table has no row"),
        ("regret", ["TEXT"], "TEXT:1 is not a row of a sweep; remove that line, or restore"),
        ("sweep", ["--draw_only", "--table=EMPTY"], "EMPTY has no rows, so there is nothing to"),
        ("sweep", ["--draw_only", "--table=TEXT"], "TEXT:1 is not a row of a sweep"),
        (
            "autolrs",
            ["--config=quickstart", "--lowest=1", "--highest=0.5"],
            "lowest=1 and highest=0.5 are not an interval of learning rates",
        ),
        (
            "lr_transfer",
            ["--config=lr_transfer:none"],
            ": preset 'none' is not cpu, gpu or smoke",
        ),
    ],
)
def test_mistakes(module: str, flags: list[str], message: str, tmp_path: Path) -> None:
    workdir = [] if module == "regret" else [f"--workdir={tmp_path / 'w'}"]
    bad = {"cell": "a", "trunk": "a", "loss": 2.0, "tokens": "many", "seed": None}
    for name, text in (("EMPTY", ""), ("TEXT", json.dumps(bad))):
        (tmp_path / name).write_text(text)
        flags = [flag.replace(name, str(tmp_path / name)) for flag in flags]
    status, line = refused(module, *workdir, *flags)
    assert status == 2
    assert line.startswith("error: ")
    assert message in line
    assert line.count("\n") == 1
    assert not list((tmp_path / "w").glob("*.html"))


@pytest.mark.slow
def test_a_killed_and_shared_sweep_has_the_same_table(tmp_path: Path) -> None:
    """A sweep that is killed three times and then finished by two processes at once has the table
    of an uninterrupted sweep.
    """
    whole = launched.start(command(tmp_path / "whole"))
    output = whole.communicate()
    assert whole.returncode == 0, output
    expected = losses(tmp_path / "whole")
    assert len(expected) == 4
    for seconds in (12, 18, 15):
        process = launched.start(command(tmp_path / "cut"))
        time.sleep(seconds)
        process.kill()
        process.communicate()
    both = [launched.start(command(tmp_path / "cut")) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert losses(tmp_path / "cut") == expected
    left = list((tmp_path / "cut" / "cells").glob("trunk-*"))
    assert not left, "trunks are removed when all is done"
    # The table has all cells, so nothing is trained in another folder.
    table = f"--table={tmp_path / 'cut' / 'sweep.jsonl'}"
    again = launched.start(command(tmp_path / "other", table))
    output = again.communicate()
    assert again.returncode == 0, output
    assert losses(tmp_path / "other") == expected
    assert not list((tmp_path / "other").glob("cells/*/run"))
    assert json.loads((tmp_path / "other" / "sweep.jsonl").read_text().splitlines()[0])["cell"]
    assert "<svg" in (tmp_path / "other" / "sweep.html").read_text()
