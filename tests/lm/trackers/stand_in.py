"""A stand-in for a tracker's package that is not installed: it records the arguments of
its calls.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest


class Run:
    """`metrics` holds the arguments of define_metric, `logged` those of log."""

    def __init__(self) -> None:
        self.metrics: list[tuple[Any, ...]] = []
        self.logged: list[tuple[Any, ...]] = []
        self.is_finished = False

    def define_metric(self, *args: Any, **options: Any) -> None:
        self.metrics.append((*args, options))

    def log(self, *args: Any, **options: Any) -> None:
        assert not self.is_finished
        self.logged.append((*args, options))

    def finish(self) -> None:
        self.is_finished = True


class Package(types.ModuleType):
    """`runs` holds the options of each call of `init` and the run that it returned."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.runs: list[tuple[dict[str, Any], Run]] = []

    def init(self, **options: Any) -> Run:
        self.runs.append((options, Run()))
        return self.runs[-1][1]


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> Package:
    package = Package(name)
    monkeypatch.setitem(sys.modules, name, package)
    return package
