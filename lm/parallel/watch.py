"""How several processes end together.

Each process sends a sign of life every second and looks for those of the others. When one fails or
falls silent, every other process reports it in one line and exits, wherever it waits: a collective
whose peer is gone can be neither cancelled nor timed out. Messages go through the key-value service
of JAX's process 0.

JAX has heartbeats too (heartbeat_timeout_seconds of jax.distributed.initialize). They notice a
silent process as well as ours do. But then they abort all other processes by SIGABRT from a C++
thread, with about twenty lines and a stack trace, the only place that names the lost process; and a
waiting call may raise in the main thread first. So JAX's heartbeats are set to act later than ours.
They remain for two cases: a process whose Python is stuck, and the loss of process 0, which runs
the service. `have_last_word` turns such an abort into one line and an exit status.

Exit statuses: MISTAKE for a user's mistake; UNFINISHED also for a lost process, since the same
command continues the run; INTERRUPTED; 1 for anything else (lm/mapping.py).
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
from jax._src import distributed  # the client has no public name; Orbax takes it from here too

from lm import files
from lm.mapping import INTERRUPTED, MISTAKE, UNFINISHED, UserError

# How messages of transports and of JAX's service begin when they report a failure.
TRANSPORT = re.compile(r"\b(Gloo|NCCL)\b|coordination service|[Bb]arrier")
BEAT_SECONDS = 1.0
UNWIND_SECONDS = 20.0  # the time that a failed process has to close its files

_AGAIN = "start all processes again with the same command to continue from the last checkpoint"


def client() -> Any:
    """The client of the service; None in a single process."""
    return distributed.global_state.client


def index() -> int:
    """This process's number; touches no device, unlike jax.process_index()."""
    return distributed.global_state.process_id


def count() -> int:
    return distributed.global_state.num_processes


@contextlib.contextmanager
def one_fate() -> Iterator[None]:
    """If the body fails here, the other processes end too; a single process just fails."""
    try:
        yield
    except BaseException as error:
        if Watch.running is not None:
            Watch.running.report(error)
        raise


def have_last_word() -> None:
    """Handles SIGABRT. When a process dies, JAX's service (if it was process 0) or gloo (on a CPU)
    may abort this process before the watch notices. A handler of SIGABRT runs in the thread that
    aborts, so it can be Python.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(_on_abort)], ctypes.c_void_p
    libc.signal(signal.SIGABRT, _on_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(signum: int) -> None:
    reason = "aborted (see above), most likely because another process is gone"
    end(UNFINISHED, f"process {index()} of {count()} {reason}; {_AGAIN}")


def is_of_others(error: BaseException) -> bool:
    """Whether a failure, or one of its causes, may mean that another process is gone: a failure of
    a collective, which JAX raises as one of several kinds, or of a barrier.
    """
    found: BaseException | None = error
    while found is not None:
        kinds = jax.errors.JaxRuntimeError | TimeoutError
        if isinstance(found, kinds) or TRANSPORT.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


class Watch(threading.Thread):
    """The thread that sends this process's signs of life and looks for those of the others."""

    running: Watch | None = None

    def __init__(self, silence_seconds: float) -> None:
        super().__init__(daemon=True)
        self._silence = silence_seconds
        self._stopped = threading.Event()
        self._has_reported = False
        Watch.running = self

    def stop(self) -> None:
        Watch.running = None
        self._stopped.set()
        self.join()

    def report(self, error: BaseException) -> None:
        """Reports to the others what ended this process; only once."""
        if self._has_reported:
            return
        self._has_reported = True
        if is_of_others(error):
            # Perhaps only because a peer is gone: then the watch notices and ends this process.
            time.sleep(self._silence + 5 * BEAT_SECONDS)
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone as well
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
            time.sleep(UNWIND_SECONDS)  # in this time it may end by itself
        elif index() == 0:
            time.sleep(3 * BEAT_SECONDS)  # the others read the failure from this process
        end(code, line if code == UNFINISHED else f"process {failed} of {count()}: {line}")


def _set(what: str, value: str) -> None:
    client().key_value_set(f"espalier/{what}/{index()}", value, allow_overwrite=True)


def _get(what: str) -> dict[int, str]:
    """The values of all processes, by process."""
    found = client().key_value_dir_get(f"espalier/{what}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}


def _gone(process: int) -> str:
    return f"process {process} of {count()} is gone; {_AGAIN}"


def status(error: BaseException) -> int:
    """The exit status with which launch/cli.py would end the process."""
    if isinstance(error, UserError) or files.message_of(error) is not None:
        return MISTAKE
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def end(code: int, line: str) -> NoReturn:
    """Ends this process; may be called from any of its threads."""
    print(f"error: {line}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def depart(code: int) -> NoReturn:
    """Exits after a failure instead of JAX's shutdown, which would wait for the others."""
    if index() == 0:
        time.sleep(3 * BEAT_SECONDS)  # the others read the failure from this process
    _leave(code)
