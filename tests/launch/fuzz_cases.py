"""Runs a case of tests/launch/fuzz.py and decides what counts as a fault."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import xla_bridge

from lm.config import UserError

# Errors that depend on the number or kind of devices come once the devices are known.
OF_DEVICES = ("devices, found", "rows do not divide over data*fsdp", "set form to auto")


class TouchedError(BaseException):
    """A device was about to be initialized."""


@dataclasses.dataclass
class Found:
    """`kinds` counts how the cases ended; `faults` holds the full text of each fault."""

    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    slowest: float = 0.0


@contextlib.contextmanager
def without_devices() -> Iterator[None]:
    """Inside this context, the first look for a device raises."""
    assert not xla_bridge.backends_are_initialized()
    whole = xla_bridge.backends

    def touched() -> Any:
        raise TouchedError

    xla_bridge.backends = touched
    try:
        yield
    finally:
        xla_bridge.backends = whole


def near(rng: random.Random, name: str) -> str:
    """A misspelled name: a letter is dropped or doubled, or all are capitals."""
    place = rng.randrange(len(name))
    cut = (name[:place] + name[place + 1 :], name[: place + 1] + name[place:], name.upper())
    return rng.choice(cut)


def run(found: Found, where: str, work: Callable[[], Any], *, is_late: bool = False) -> None:
    """Runs a case and records how it ended."""
    start, message = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
            work()
        kind = "accepted"
    except TouchedError:
        kind = "came to a device"
    except UserError as error:
        kind = "refused"
        line = str(error)
        if "\n" in line or len(line) > 600:
            found.faults.append(f"{where}\n  not one short line: {line[:700]!a}")
        if is_late and not any(words in line for words in OF_DEVICES):
            found.faults.append(f"{where}\n  refused after a device was initialized: {line}")
    except SystemExit as stop:
        line = message.getvalue()
        kind = {0: "accepted", 2: "refused"}.get(int(stop.code or 0), f"status {stop.code}")
        # Progress lines of the command may come before the error.
        errors = [x for x in line.splitlines() if x.startswith("error: ")]
        wanted = line.splitlines()[-1:] if kind == "refused" else []
        if stop.code not in (None, 0, 2) or "Traceback" in line or errors != wanted:
            found.faults.append(f"{where}\n  status {stop.code}: {line[-900:]}")
    except BaseException:  # noqa: BLE001 (any other exception is a fault)
        kind = "traceback"
        found.faults.append(f"{where}\n{traceback.format_exc(limit=-6)}")
    found.kinds[kind + (" late" if is_late else "")] += 1
    took = time.monotonic() - start
    found.slowest = max(found.slowest, took)
    if took > 5:
        print(f"{took:.1f} s: {where}", flush=True)
