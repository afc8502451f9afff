"""launch.train as a process: exit codes and output, signals, and a folder in use."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from lm.mapping import UNFINISHED
from lm.run import checkpoint, record
from tests.lm import launched
from tests.lm.lab import assert_equal_runs
from tests.lm.launched import ROOT, STEPS


def stop_twice(workdir: Path) -> list[str]:
    """Stops a run by SIGTERM, resumes it by the command that it printed, and stops it by SIGINT.
    Returns the command that the second launch printed.
    """
    command = launched.command(workdir)
    for signum, step in ((signal.SIGTERM, 10), (signal.SIGINT, 45)):
        process = launched.start(command)
        launched.interrupt(process, workdir, signum=signum, step=step)
        out, err = process.communicate()
        assert process.returncode == UNFINISHED, err
        found = re.fullmatch(r"stopped at step (\d+), saved; resume with: (.*)\n", out)
        assert found, out
        assert step <= int(found[1]) < STEPS
        assert checkpoint.steps(workdir)[-1] == int(found[1])
        command = shlex.split(found[2])
        arguments = launched.command(workdir)[3:]
        assert command[-len(arguments) - 1 :] == ["train", *arguments]
        command = [sys.executable, str(ROOT / "espalier.py"), "train", *arguments]
    return command


def test_a_run_stops_at_signals(tmp_path: Path) -> None:
    stop_twice(tmp_path / "a run")


@pytest.mark.slow
def test_a_run_stopped_by_signals_is_resumed(tmp_path: Path) -> None:
    """The resumed run ends like a run that was not stopped."""
    workdir = tmp_path / "a run"
    for command in (stop_twice(workdir), launched.command(tmp_path / "whole")):
        process = launched.start(command)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert re.search(r"^validation text: \d\.\d{4} bits per byte$", out, re.MULTILINE)
    assert out.endswith(f"report: {tmp_path / 'whole' / 'report.html'}\n")
    assert_equal_runs(workdir, tmp_path / "whole")


def test_a_folder_in_use_is_one_line(tmp_path: Path) -> None:
    with record.locked(tmp_path):
        process = launched.start(launched.command(tmp_path))
        out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: --workdir={tmp_path} is in use by process ")
