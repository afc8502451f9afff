"""`pytest tests/kernels --proof=FILE` writes what the contract suite has shown of
every form on this device, for `launch.catalog`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kernels.primitives import device
from launch.benchmarks import machine
from lm import files

# Triton's decorator reads it when a kernel's module is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Of a form that is interpreted here this is fast: the first case of two chunks in each dtype.
SHORT = (64, 65)

FILES = ("test_contract.py", "test_documents.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", help="JSON file of outcomes by op and form; see launch.catalog")


def pytest_configure(config: pytest.Config) -> None:
    path: Any = config.getoption("--proof", default=None)
    if path:
        config.pluginmanager.register(Proof(Path(path)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[tuple[str, ...]] = set()
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("form") not in device.TARGETS:
            continue
        case: Any = params.get("case")
        is_first = False
        is_asked = cast(Any, item).originalname == "test_equals_reference"
        if is_asked and case.dims["T"] in SHORT:
            key = (params["name"], params["form"], case.dtype)
            is_first = key not in seen
            seen.add(key)
        if not is_first:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Pallas kernels run without their device."""
    with device.interpreted():
        yield


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
