"""Weights & Biases: a run in a project of yours, which continues when the run here is resumed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lm import trackers

MODES = ("online", "offline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
    """A run in a project of Weights & Biases.

    Attributes:
      project: name of the project
      entity: a team; empty: your own account
      mode: online, or offline (files in workdir/wandb, for `wandb sync`)
    """

    project: str = "espalier"
    entity: str = ""
    mode: str = "online"
    package: ClassVar[str] = "wandb"

    def problem(self) -> str | None:
        if not self.project:
            return "project is empty; name one"
        if self.mode not in MODES:
            return f"mode={self.mode!r} is not one of {', '.join(MODES)}"
        return None

    def open(self, workdir: Path, config: Mapping[str, Any], first_step: int) -> _Log:
        # A step that is trained again is logged a second time. Its number is logged as a value,
        # because W&B's own step counter never goes back.
        del first_step
        run = importlib.import_module(self.package).init(
            project=self.project,
            entity=self.entity or None,
            mode=self.mode,
            id=trackers.run_id(workdir),
            name=workdir.resolve().name,
            dir=str(workdir),
            config=dict(config),
            resume="allow",
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return _Log(run)


class _Log:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
