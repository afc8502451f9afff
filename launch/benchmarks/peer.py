"""A program of others that takes turns with ours: a process that is asked, line by line, how long
something takes, so that both see the same minutes of the machine.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from lm import files


class PeerError(Exception):
    """A peer's process has ended; the message is its last."""


class Process(NamedTuple):
    """A peer's. `told` is what it says of itself; `ask(pass, runs)` are the seconds they took."""

    describe: Callable[[], str]
    ask: Callable[[str, int], float]


@contextmanager
def started(command: Sequence[str]) -> Iterator[Process]:
    """A process, which may end at any time: what is asked of it then raises `PeerError`."""
    # Errors go to a file: a pipe that nobody reads would stop the process when it is full.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, bufsize=0, stdin=-1, stdout=-1, stderr=errors) as process,
    ):
        to, back = process.stdin, process.stdout
        assert to is not None
        assert back is not None

        def read() -> str:
            if line := back.readline():
                return line.decode().strip()
            status = process.wait()
            errors.seek(0)
            raise PeerError(files.last_line(errors.read(), f"status {status}"))

        said: list[str] = []

        def describe() -> str:
            if not said:
                said.append(read().removeprefix("ready").strip())
            return said[0]

        def ask(which: str, runs: int) -> float:
            describe()
            with suppress(BrokenPipeError):  # what it said last is read below
                to.write(f"{which} {runs}\n".encode())
            return float(read())

        yield Process(describe, ask)
