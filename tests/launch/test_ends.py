"""How a command ends early: errors in one line, signals, and output that nobody reads."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli, ends
from lm import metrics
from lm.config import UserError
from lm.mapping import INTERRUPTED, UNFINISHED
from lm.run import checkpoint
from tests.lm import launched
from tests.lm.lab import records

STATUS = {signal.SIGTERM: UNFINISHED, signal.SIGHUP: UNFINISHED, signal.SIGINT: INTERRUPTED}


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli.mistakes_in_one_line():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
    assert stop.value.code == 2
    assert (
        "runs/x/metrics.jsonl: No space left on device; free some space" in capsys.readouterr().err
    )


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="not of the system"), cli.mistakes_in_one_line():
        raise OSError("not of the system")
    with pytest.raises(ZeroDivisionError), cli.mistakes_in_one_line():
        _ = 1 / 0


def test_lines_of_a_message_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), cli.mistakes_in_one_line():
        raise UserError("first\n  second")
    assert capsys.readouterr().err == "error: first second\n"


def test_a_log_line_is_plain() -> None:
    text = (
        "import logging\nfrom launch import cli\n"
        "def main(argv):\n"
        "    for name in ('info', 'warning', 'error'):\n"
        "        getattr(logging.getLogger('lm.x'), name)('a %s', 'line')\n"
        "cli.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=launched.ROOT, capture_output=True, text=True
    )
    assert done.stderr == "a line\nwarning: a line\nerror: a line\n"


@pytest.mark.parametrize("signum", ends.SIGNALS)
def test_a_signal_runs_the_cleanup(
    tmp_path: Path, signum: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message is one line and the work cleans up. An ignored signal stays ignored."""

    def work() -> None:
        try:
            (tmp_path / "begun").touch()
            os.kill(os.getpid(), signum)
        finally:
            (tmp_path / "begun").unlink()

    with pytest.raises(SystemExit) as stop, cli.mistakes_in_one_line(), ends.unwinding():
        work()
    assert stop.value.code == UNFINISHED
    name = signal.Signals(signum).name
    assert capsys.readouterr().err == f"stopped by {name}; the same command starts again\n"
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with ends.unwinding():
            os.kill(os.getpid(), signum)
    finally:
        signal.signal(signum, before)


WAITING = """
import sys, time
from launch import cli, ends
if sys.argv.pop(1) == "import":
    ends.at_once()
    print("ready", flush=True)
    time.sleep(60)

def main(argv):
    print("ready", flush=True)
    time.sleep(60)

cli.run(main)
"""


@pytest.mark.parametrize("signum", STATUS)
@pytest.mark.parametrize("at", ["import", "main"])
def test_a_signal_during_the_start_is_one_line(signum: int, at: str) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WAITING, at]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        _, err = process.communicate()
    assert process.returncode == STATUS[signal.Signals(signum)], err
    assert len(err.splitlines()) == 1


DROPPING = """
import os, signal, sys, time
from launch import cli

class Dropping:
    def __del__(self):  # Python drops what a destructor raises
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(0.01)

def main(argv):
    if argv[1] == "destructor":
        Dropping()
    else:
        import importing
    time.sleep(20)

def work(argv):
    if argv[1] == "work":
        exec("import importing", {"__name__": "lm.anything"})
        time.sleep(20)
    main(argv)

cli.run(work, positional=True)
"""

IMPORTED = """
import os, sys, time
try:  # an extension makes an ImportError of what is raised while it is imported
    os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(0.01)
except BaseException as error:
    raise ImportError("while initializing the extension") from error
"""


@pytest.mark.parametrize("signum", STATUS)
@pytest.mark.parametrize("at", ["destructor", "import", "work"])
def test_a_signal_is_not_lost(signum: signal.Signals, at: str, tmp_path: Path) -> None:
    """In a destructor, in an import of the launcher, and in one in the middle of the work."""
    (tmp_path / "importing.py").write_text(IMPORTED)
    env = os.environ | {"PYTHONPATH": f"{launched.ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", DROPPING, at, str(int(signum))]
    started = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert time.monotonic() - started < 15
    assert done.returncode == STATUS[signum], done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_signal_at_any_moment_of_a_start_leaves_nothing_partial(tmp_path: Path) -> None:
    """The command prints one line and ends with the right status. It leaves no partial run folder
    and no partial prepared data.
    """
    for i, moment in enumerate((0.1, 0.4, 1.0, 1.5, 2.0, 3.0)):
        signum = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[i % 3]
        workdir, data = tmp_path / f"run {i}", tmp_path / f"data {i}"
        process = launched.start([*launched.command(workdir), f"--data_dir={data}"])
        time.sleep(moment)
        process.send_signal(signum)
        out, err = process.communicate()
        assert not list(tmp_path.rglob("*tmp*"))
        if process.returncode == -signum:  # Python has not run our code yet
            assert (out, moment) == ("", 0.1)
            continue
        assert process.returncode in (UNFINISHED, INTERRUPTED), err
        assert "Traceback" not in err
        last = (out + err).splitlines()[-1]
        assert last.startswith(("stopped ", "interrupted")), out + err
        assert workdir.exists() == ("stopped at step" in out)
        assert not workdir.exists() or checkpoint.steps(workdir)


LOUD = """
import sys, time
from launch import cli

def main(argv):
    for number in range(2000):
        print(number, "x" * 100, flush=True)
        print(number, file=sys.stderr, flush=True)
    open(argv[1], "w").close()
    return 7

cli.run(main, positional=True)
"""


@pytest.mark.parametrize("how", ["pipe", "terminal", "full", "closed"])
def test_output_that_nobody_reads_does_not_end_a_command(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", LOUD, str(tmp_path / "done")]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    reader, writer = pty.openpty() if how == "terminal" else os.pipe()
    if how == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen(command, stdout=writer, stderr=writer)
    os.close(writer)
    if how in ("pipe", "terminal"):
        os.read(reader, 10)
        os.close(reader)
    assert process.wait() == 7
    assert (tmp_path / "done").exists()


@pytest.mark.slow
def test_a_run_outlives_its_log_and_saves_when_its_terminal_is_closed(tmp_path: Path) -> None:
    """`python -m launch.train ... 2>&1 | head -1` goes on, and saves at the SIGHUP of a
    terminal.
    """
    workdir = tmp_path / "run"
    process = launched.start(launched.command(workdir))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.readline()
    process.stdout.close()
    process.stderr.close()
    step = len(metrics.read(workdir))
    launched.interrupt(process, workdir, signum=signal.SIGHUP, step=step + 10)
    assert process.wait() == UNFINISHED
    assert checkpoint.steps(workdir)[-1] == records(workdir)[-1]["step"] > step
