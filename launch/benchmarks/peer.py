"""Runs a program of another project in a process that takes turns with ours. Line by line it is
asked how long something takes, so that both sides see the machine in the same state.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from lm import files


class PeerError(Exception):
    """A peer's process has ended; the message is the last line of its errors."""


class Process(NamedTuple):
    """A peer's process. `describe()` returns its versions; `ask(pass, runs)` returns the seconds
    that so many runs of a pass took.
    """

    describe: Callable[[], str]
    ask: Callable[[str, int], float]


@contextmanager
def started(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """Starts a process. It may end at any time; asking it then raises `PeerError`."""
    # Errors go to a file: a pipe that nobody reads would block the process once it is full.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, bufsize=0, stdin=-1, stdout=-1, stderr=errors, env=env
        ) as process,
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
            with suppress(BrokenPipeError):  # its last line is read below
                to.write(f"{which} {runs}\n".encode())
            return float(read())

        yield Process(describe, ask)
