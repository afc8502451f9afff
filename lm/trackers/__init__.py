"""Trackers show the records of metrics.jsonl while a run trains. One file per tracker; this folder
is listed to find them.

A file holds one frozen dataclass, named like the file in camel case. Its fields with defaults are
its options, and it has the methods of `Tracker`. metrics.jsonl is written whatever the tracker is,
and nothing is ever read back from a tracker.
"""

from __future__ import annotations

import functools
import importlib.util
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lm import files
from lm.config import Config, UserError, to_mapping
from lm.families import TRACKERS

ID = "tracker_id"  # the name of a file in the workdir


class Log(Protocol):
    """An open tracker."""

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Logs the scalars of one record, without its step. A step may be logged twice; the later
        record counts.
        """
        ...

    def close(self) -> None:
        """Returns once everything written can be seen."""
        ...


class Tracker(Protocol):
    """The options of a tracker. `package` is the package that `open` imports."""

    package: ClassVar[str]

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; called before any device is touched."""
        ...

    def open(self, workdir: Path, config: Mapping[str, Any], first_step: int) -> Log:
        """Opens the tracker for the run in `workdir`, which continues at `first_step`. Records of
        that step and later ones that were shown before belong to a launch that was cut short.
        """
        ...


def opener(config: Config, workdir: Path) -> Callable[[int], Log]:
    """A function that opens the run's tracker at a given first step.

    Raises:
      UserError: its package is not installed.
    """
    tracker: Tracker = config.log.tracker
    if importlib.util.find_spec(tracker.package) is None:
        name = TRACKERS.name_of(type(tracker))
        raise UserError(
            f"log.tracker={name!r} needs the package {tracker.package!r}, which is not installed: "
            f"pip install {tracker.package}; or set log.tracker=off"
        )
    return functools.partial(tracker.open, workdir, to_mapping(config))


def run_id(workdir: Path) -> str:
    """The run's id for trackers that keep many runs. It stays the same after a resume, and differs
    between workdirs of the same name.
    """
    path = workdir / ID
    if not path.exists():
        files.replace(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
