"""No tracker: only metrics.jsonl and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Off:
    """Shows nothing."""

    package: ClassVar[str] = "json"

    def problem(self) -> str | None:
        return None

    def open(self, workdir: Path, config: Mapping[str, Any], first_step: int) -> _Log:
        del workdir, config, first_step
        return _Log()


class _Log:
    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        del step, values

    def close(self) -> None:
        pass
