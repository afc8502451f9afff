"""The command itself: exit codes and what is printed, signals, a folder in use."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path

from lm import checkpoint, record
from tests.lm import launched
from tests.lm.lab import assert_equal_runs
from tests.lm.launched import STEPS


def test_stopped_by_signals_and_resumed(tmp_path: Path) -> None:
    """SIGTERM, then SIGINT, then the end, by the command that each launch prints; equal to a run
    that nobody stopped.
    """
    workdir = tmp_path / "a run"
    command = launched.command(workdir)
    for signum, step in ((signal.SIGTERM, 30), (signal.SIGINT, 120)):
        process = launched.start(command)
        launched.interrupt(process, workdir, signum=signum, step=step)
        out, err = process.communicate()
        assert process.returncode == 0, err
        found = re.fullmatch(r"stopped at step (\d+), saved; resume with: (.*)\n", out)
        assert found, out
        assert step <= int(found[1]) < STEPS
        assert checkpoint.steps(workdir)[-1] == int(found[1])
        command = shlex.split(found[2])
        assert command == ["python", *launched.command(workdir)[1:]]
        command[0] = sys.executable
    process = launched.start(command)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.search(r"^validation text: \d\.\d{4} bits per byte$", out, re.MULTILINE)
    assert out.endswith(f"report: {workdir / 'report.html'}\n")
    assert "Traceback" not in err
    process = launched.start(launched.command(tmp_path / "whole"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert_equal_runs(workdir, tmp_path / "whole")


def test_a_folder_in_use(tmp_path: Path) -> None:
    with record.locked(tmp_path):
        process = launched.start(launched.command(tmp_path))
        out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: --workdir={tmp_path} is in use by process ")
