"""`pytest tests/kernels --proof=FILE` writes what the contract suite has shown of
every form on this device, for `launch.catalog`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch.benchmarks import machine
from lm import files

FILES = ("test_contract.py", "test_documents.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", help="JSON file of outcomes by op and form; see launch.catalog")


def pytest_configure(config: pytest.Config) -> None:
    path: Any = config.getoption("--proof", default=None)
    if path:
        config.pluginmanager.register(Proof(Path(path)))


class Proof:
    """Counts outcomes of the tests that name an op and a form."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Counter[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        report = yield
        params = getattr(getattr(item, "callspec", None), "params", {})
        ended = report.when == "call" or (report.when == "setup" and not report.passed)
        if ended and item.path.name in FILES and "form" in params:
            key = f"{params['name']}/{params['form']}"
            self.counts.setdefault(key, Counter())[report.outcome] += 1
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        del session
        head = machine.describe("pytest")
        forms = {key: dict(counts) for key, counts in sorted(self.counts.items())}
        files.replace(self.path, json.dumps(head | {"forms": forms}, indent=1) + "\n")
