"""What a run measures about itself: the time between records, and traces of a few steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from lm import build as build_lib
from lm import metrics
from lm.build import Build
from lm.config import Config


class Clock:
    """Wall time between records, without the time spent inside `stopped`."""

    def __init__(self, built: Build, config: Config) -> None:
        kind = built.mesh.devices.flat[0].device_kind
        peak = metrics.peak_flops(kind, config.model.precision)
        self._peak = None if peak is None else peak * built.mesh.size
        self._flops = build_lib.flops_per_token(built)
        self._tokens = config.tokens_before
        self._last: tuple[float, int] | None = None

    def lap(self, step: int) -> dict[str, Any]:
        """The time/ entries of a record, for the steps since the last record."""
        now, last = time.monotonic(), self._last
        self._last = (now, step)
        if last is None or step == last[1]:
            return {}
        seconds = (now - last[0]) / (step - last[1])
        rate = (self._tokens(step) - self._tokens(last[1])) / (now - last[0])
        values = {"time/step_seconds": seconds, "time/tokens_per_second": rate}
        return (
            values if self._peak is None else values | {"time/mfu": rate * self._flops / self._peak}
        )

    @contextlib.contextmanager
    def stopped(self) -> Generator[None]:
        """Leaves out the time of this block, as for evaluating and saving."""
        began = time.monotonic()
        yield
        if self._last is not None:
            self._last = (self._last[0] + time.monotonic() - began, self._last[1])


class Profiler:
    """Traces steps [first, first + count) for TensorBoard's profile plugin or Perfetto."""

    def __init__(self, workdir: Path, count: int, step: int, end: int) -> None:
        self._folder = str(workdir / "profile")
        first = max(step, min(step + 5, end - count))  # skips compilation and the first steps
        self._first, self._last = (first, first + count) if count else (math.inf, math.inf)
        self._is_on = False

    def __enter__(self) -> Profiler:
        return self

    def at(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._is_on = True
        elif step == self._last:
            self.__exit__()

    def __exit__(self, *error: Any) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
