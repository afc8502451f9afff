"""What happens between the start of a process and the end of its first step, and for how long."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

STAT = Path("/proc/self/stat")


class Start:
    """Seconds by part. A part lasts from the end of the one before; the first, `imports`, from the
    start of the process, where the system says when that was.
    """

    def __init__(self) -> None:
        self._last: float | None = time.monotonic()
        age = _age()
        self._parts = {} if age is None else {"imports": age}

    def done(self, part: str) -> None:
        """Ends a part; nothing once the first step has ended."""
        if self._last is None:
            return
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def end(self) -> None:
        """Ends the last part, the first step, and logs all of them."""
        if self._last is None:
            return
        self.done("step")
        self._last = None
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items())
        log.info("first step after %.1f s: %s", sum(self._parts.values()), parts)


def _age() -> float | None:
    """Seconds since this process started; None where the system does not say."""
    try:
        fields = STAT.read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return None
