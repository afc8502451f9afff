"""Failures of reading and writing checkpoints, told in one line.

Orbax reports them as exceptions of many kinds, and complains besides: in log records, and from
coroutines that it abandoned. Among them are those of a process that waits for another which is
gone: no failure of a disk, and left to lm/parallel/watch.py.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax

from lm.config import UserError
from lm.parallel import watch

# What Orbax, tensorstore and json raise on files that are missing, cut short or garbled, and on a
# full disk; Orbax also raises plain Exception, which `Telling` knows.
FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError)
ORBAX = f"{os.sep}orbax{os.sep}"
LOGGERS = ("absl", "asyncio")  # where Orbax logs a failure, in pages of tracebacks, and raises it
SETTLE_SECONDS = 0.1  # in which reads end that were under way when one of them failed


class Telling:
    """A context manager: failures of reading or writing leave it as `told(reason)`, in one line;
    those of talking to other processes as JAX's.
    """

    def __init__(self, told: Callable[[str], UserError]) -> None:
        self._told = told

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and (kind is Exception or isinstance(error, FAILURES)):
            if watch.count() > 1 and watch.is_of_others(error):
                raise jax.errors.JaxRuntimeError(str(error)) from None
            cause = error.__cause__ or error
            text, full = str(cause), os.strerror(errno.ENOSPC)
            cause.__traceback__ = error.__traceback__ = None
            time.sleep(SETTLE_SECONDS)
            gc.collect()  # what was abandoned complains now, while `quiet` listens
            # tensorstore tells of a full disk among much else.
            raise self._told(full if full in text else " ".join(text.split())[:160]) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """When one read or write of many fails, Orbax abandons the others and closes their event loop.
    Each complains where nobody can catch it; the failure itself is raised.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_abandoned = code is not None and ORBAX in code.co_filename
        if not is_abandoned and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Also of asyncio, which logs the exceptions of tasks that Orbax abandoned."""
    return ORBAX not in record.pathname + record.getMessage()
