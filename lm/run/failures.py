"""Failures to read or write checkpoints, reduced to one line each.

Orbax raises many kinds of exceptions for them. It also complains in log records and from coroutines
that it abandoned. Some of its exceptions mean that another process is gone. Those are not disk
failures; lm/parallel/watch.py handles them.
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
# full disk. Orbax also raises plain Exception, which `RaisedAs` handles.
FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError)
ORBAX = f"{os.sep}orbax{os.sep}"
LOGGERS = ("absl", "asyncio")  # these log pages of tracebacks for a failure that is also raised
SETTLE_SECONDS = 0.1  # time for other reads under way to end after one of them has failed


class RaisedAs:
    """A context manager that raises a failure to read or write as `error(reason)`, where `reason`
    is one line. A failure to talk to other processes is raised as JAX's error instead.
    """

    def __init__(self, error: Callable[[str], UserError]) -> None:
        self._error = error

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
            gc.collect()  # abandoned coroutines complain now, while `quiet` filters them
            # tensorstore buries "no space left on device" in a long message.
            raise self._error(full if full in text else " ".join(text.split())[:160]) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the noise that Orbax makes besides the exception that it raises. When one of many
    reads or writes fails, Orbax abandons the others and closes their event loop, and each of them
    complains where nobody can catch it.
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
    """Filters asyncio's records too, which hold the exceptions of tasks that Orbax abandoned."""
    return ORBAX not in record.pathname + record.getMessage()
