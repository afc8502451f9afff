"""How a command ends early: by signals, and when its output has no reader.

    SIGTERM, SIGHUP   the stack is unwound, one line is printed, status UNFINISHED
    SIGINT            the same by KeyboardInterrupt, status 130
    output            if the terminal or pipe is closed, output is dropped and the work goes on

An exception that a signal raises can get lost: an extension that is being imported makes another
one of it, and a destructor or a callback of the garbage collector drops it. So a signal that
arrives in an import ends the launcher at once, or waits for the import; and one whose exception was
dropped is sent again.

Training handles these signals itself once it has something to save (lm/parallel/processes.py). A
signal that is ignored from the start stays ignored, as nohup and launch/slurm.sh require.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from lm.mapping import INTERRUPTED, UNFINISHED

SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # and SIGINT, which raises KeyboardInterrupt

AGAIN_SECONDS = 0.05  # after which a signal that could not be raised is sent again


class Stopped(SystemExit):
    """Raised in the main thread when a signal arrives."""

    def __init__(self, signum: int) -> None:
        super().__init__(UNFINISHED)
        self.signum = signum
        self.name = signal.Signals(signum).name

    def __str__(self) -> str:
        return f"stopped by {self.name}"


def at_once() -> None:
    """Makes signals print a line and exit at once, for the time in which a launcher is imported."""
    for signum in (*SIGNALS, signal.SIGINT):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """In the body, a signal raises `Stopped`, or KeyboardInterrupt. A second SIGTERM or SIGHUP acts
    as it would without.
    """
    before = {s: signal.getsignal(s) for s in (*SIGNALS, signal.SIGINT)}
    taken = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}
    report = sys.unraisablehook

    def stop(signum: int, frame: FrameType | None) -> None:
        importer = _importer(frame)
        if importer == "__main__":  # the launcher imports what it needs, and has done nothing yet
            _end(signum, frame)
        if importer is not None:
            _again(signum)
            return
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(signum, taken[signal.Signals(signum)])
        raise Stopped(signum)

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not isinstance(error, Stopped | KeyboardInterrupt):
            report(unraisable)
            return
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        signal.signal(signum, stop)
        _again(signum)

    for signum in taken:
        signal.signal(signum, stop)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = report
        for signum, handler in taken.items():
            signal.signal(signum, handler)


def _end(signum: int, frame: object) -> None:
    del frame
    os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
    os._exit(INTERRUPTED if signum == signal.SIGINT else UNFINISHED)


def _again(signum: int) -> None:
    """Sends the signal to this process again, from another thread: here nothing can be raised."""
    timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signum))
    timer.daemon = True
    timer.start()


def _importer(frame: FrameType | None) -> str | None:
    """The module that executes an import, the outermost if several do; None if none does."""
    found = None
    while frame is not None:
        is_import = frame.f_code.co_filename.startswith("<frozen importlib._bootstrap")
        frame = frame.f_back
        if is_import and frame is not None:
            found = str(frame.f_globals.get("__name__"))
    return found


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
