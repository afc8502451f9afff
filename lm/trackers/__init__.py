"""Trackers: where the records of metrics.jsonl are shown while a run trains, one file each, found
by listing this folder.

A file holds one frozen dataclass, named as the file in camel case, whose fields with defaults are
its options, with the methods of `Tracker`. metrics.jsonl is written whatever the tracker is, and
nothing is ever read back from one.
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

ID = "tracker_id"  # a file of the workdir


class Log(Protocol):
    """An open tracker."""

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """The scalars of one record, without its step. A step may come a second time: the later
        record counts.
        """
        ...

    def close(self) -> None:
        """What was written is shown on return."""
        ...


class Tracker(Protocol):
    """`package`: the one that `open` imports."""

    package: ClassVar[str]

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        ...

    def open(self, workdir: Path, config: Mapping[str, Any], first_step: int) -> Log:
        """For the run in `workdir`, which goes on at `first_step`: what was shown of that step and
        of later ones belongs to a run that was cut short.
        """
        ...


def opener(config: Config, workdir: Path) -> Callable[[int], Log]:
    """What opens the tracker of a run at its first step.

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
    """Names the run of a workdir for trackers that keep many: the same after a resume, another for
    a workdir of the same name.
    """
    path = workdir / ID
    if not path.exists():
        files.replace(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
