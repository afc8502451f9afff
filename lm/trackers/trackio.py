"""Trackio, which stores its runs on this machine; `trackio show` shows them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lm import trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trackio:
    """A run of `project`, named after the workdir and a part of its id.

    Attributes:
      project: name of the project
    """

    project: str = "espalier"
    package: ClassVar[str] = "trackio"

    def problem(self) -> str | None:
        return None if self.project else "project is empty; name one"

    def open(self, workdir: Path, config: Mapping[str, Any], first_step: int) -> _Log:
        del first_step  # a step that is trained again is logged a second time
        run = importlib.import_module(self.package).init(
            project=self.project,
            name=f"{workdir.resolve().name}-{trackers.run_id(workdir)[:8]}",
            config=dict(config),
            resume="allow",
        )
        return _Log(run)


class _Log:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
