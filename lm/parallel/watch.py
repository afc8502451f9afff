"""The common fate of several processes.

Each gives a sign of life every second and looks for those of the others. When one fails, or falls
silent, every other one says so in one line and ends, wherever it waits: a collective whose peer is
gone can be neither cancelled nor timed out. Words go through the service that JAX's process 0 keeps
for all of them.

JAX has heartbeats, too (heartbeat_timeout_seconds of jax.distributed.initialize). They notice a
silent process as well as these do, but then abort every other one by SIGABRT from a thread of C++,
with some twenty lines and a stack trace, in which alone the lost process is named; and a call that
waits may raise in the main thread first. So they are set to come later than these. They are what is
left where these cannot run: in a process whose Python stands still, and when process 0, which keeps
the service, is lost. `have_last_word` makes one line and a status of them.

Exit statuses: MISTAKE; UNFINISHED of a loss, too, which the same command mends; INTERRUPTED; 1 of
anything else (lm/mapping.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client has no public name; Orbax, too, takes it from here

from lm import files
from lm.mapping import INTERRUPTED, MISTAKE, UNFINISHED, UserError

# How transports and JAX's service begin to tell of a failure.
TRANSPORT = re.compile(r"\b(Gloo|NCCL)\b|coordination service|[Bb]arrier")
BEAT_SECONDS = 1.0
UNWIND_SECONDS = 20.0  # that a process which failed has to close its files

_AGAIN = "the last checkpoint counts, start all of them again with the same command"


def client() -> Any:
    """Of the service; None in one process."""
    return distributed.global_state.client


def index() -> int:
    """This process's number; touches no device, unlike jax.process_index()."""
    return distributed.global_state.process_id


def count() -> int:
    return distributed.global_state.num_processes


@contextlib.contextmanager
def one_fate() -> Iterator[None]:
    """What ends the body here ends the other processes, too; nothing to one process."""
    try:
        yield
    except BaseException as error:
        if Watch.running is not None:
            Watch.running.tell(error)
        raise


def have_last_word() -> None:
    """When a process dies, JAX's service (if it was process 0) or gloo (on CPU) may abort this one
    before the watch sees that. A handler of SIGABRT runs in the thread that aborts, and so can be
    in Python.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(_on_abort)], ctypes.c_void_p
    libc.signal(signal.SIGABRT, _on_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(signum: int) -> None:
    reason = "aborted (see above), most likely because another process is gone"
    end(UNFINISHED, f"process {index()} of {count()} {reason}; {_AGAIN}")


def is_of_others(error: BaseException) -> bool:
    """Whether a failure, or what it comes from, may be that another process is gone: that of a
    collective, which JAX raises as one of several kinds, or of a barrier.
    """
    found: BaseException | None = error
    while found is not None:
        kinds = jax.errors.JaxRuntimeError | TimeoutError
        if isinstance(found, kinds) or TRANSPORT.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


class Watch(threading.Thread):
    """Gives signs of life of this process and looks for those of the others."""

    running: Watch | None = None

    def __init__(self, silence_seconds: float) -> None:
        super().__init__(daemon=True)
        self._silence = silence_seconds
        self._stopped = threading.Event()
        self._has_told = False
        Watch.running = self

    def stop(self) -> None:
        Watch.running = None
        self._stopped.set()
        self.join()

    def tell(self, error: BaseException) -> None:
        """Tells the others what ended this process; once."""
        if self._has_told:
            return
        self._has_told = True
        if is_of_others(error):
            # Perhaps only because a peer is gone: the watch learns that, and ends this process.
            time.sleep(self._silence + 5 * BEAT_SECONDS)
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # its service may be gone as well
            _set("failed", json.dumps([status(error), " ".join(line.split())]))

    def run(self) -> None:
        last = {i: ("", time.monotonic()) for i in range(count())}
        for beat in itertools.count():
            if self._stopped.wait(BEAT_SECONDS):
                return
            try:
                _set("beat", str(beat))
                beats, failures = _get("beat"), _get("failed")
            except jax.errors.JaxRuntimeError:
                if not self._stopped.is_set():
                    end(UNFINISHED, _gone(0))
                return
            now = time.monotonic()
            if failures:
                self._end_with(failures)
            last |= {i: (value, now) for i, value in beats.items() if value != last[i][0]}
            silent = [i for i, (_, seen) in last.items() if now - seen > self._silence]
            if silent:
                self._end_with({silent[0]: json.dumps([UNFINISHED, _gone(silent[0])])})

    def _end_with(self, failures: dict[int, str]) -> NoReturn:
        failed = index() if index() in failures else min(failures)
        code, line = json.loads(failures[failed])
        if failed == index():
            time.sleep(UNWIND_SECONDS)  # in which it ends by itself, if it can
        elif index() == 0:
            time.sleep(3 * BEAT_SECONDS)  # the others read it here
        end(code, line if code == UNFINISHED else f"process {failed} of {count()}: {line}")


def _set(what: str, value: str) -> None:
    client().key_value_set(f"espalier/{what}/{index()}", value, allow_overwrite=True)


def _get(what: str) -> dict[int, str]:
    """By process."""
    found = client().key_value_dir_get(f"espalier/{what}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}


def _gone(process: int) -> str:
    return f"process {process} of {count()} is gone; {_AGAIN}"


def status(error: BaseException) -> int:
    """As launch/cli.py ends a process."""
    if isinstance(error, UserError) or files.told(error) is not None:
        return MISTAKE
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def end(code: int, line: str) -> NoReturn:
    """Ends this process from any of its threads."""
    print(f"error: {line}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def depart(code: int) -> NoReturn:
    """At exit after a failure, in place of JAX's shutdown, which would wait for the others."""
    if index() == 0:
        time.sleep(3 * BEAT_SECONDS)  # the others read here what failed
    _leave(code)
