"""How a command ends early: by signals, and when its output has no reader.

    SIGTERM, SIGHUP   the stack is unwound, one line is printed, status UNFINISHED
    SIGINT            the same by KeyboardInterrupt, status 130
    output            if the terminal or pipe is closed, output is dropped and the work goes on

Training handles these signals itself once it has something to save (lm/parallel/processes.py). A
signal that is ignored from the start stays ignored, as nohup and launch/slurm.sh require.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from lm.mapping import INTERRUPTED, UNFINISHED

SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # Python turns SIGINT into an exception itself


class Stopped(SystemExit):
    """Raised in the main thread when a signal arrives."""

    def __init__(self, signum: int) -> None:
        super().__init__(UNFINISHED)
        self.name = signal.Signals(signum).name

    def __str__(self) -> str:
        return f"stopped by {self.name}"


def at_once() -> None:
    """Makes signals print a line and exit at once, for the time in which a launcher is imported."""

    def end(signum: int, frame: object) -> None:
        del frame
        os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
        os._exit(INTERRUPTED if signum == signal.SIGINT else UNFINISHED)

    for signum in (*SIGNALS, signal.SIGINT):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, end)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """A signal in the body raises `Stopped`; a second one of its kind has its usual effect."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    taken = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}

    def stop(signum: int, frame: object) -> None:
        del frame
        signal.signal(signum, taken[signal.Signals(signum)])
        raise Stopped(signum)

    for signum in taken:
        signal.signal(signum, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for signum, handler in taken.items():
            signal.signal(signum, handler)


class _Outlet(io.FileIO):
    """Accepts all output, and drops what the file no longer takes."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlast_readers() -> None:
    """Makes writing to stdout and stderr succeed when nobody reads them."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # closed from the start, or replaced
            setattr(sys, name, stream or open(os.devnull, "w"))  # noqa: SIM115 (until the end)
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        outlet = io.BufferedWriter(_Outlet(number, "w", closefd=False))
        kept = io.TextIOWrapper(
            outlet, stream.encoding, stream.errors, line_buffering=stream.line_buffering
        )
        setattr(sys, name, kept)
