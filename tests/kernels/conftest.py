"""On the CPU the contract suite interprets kernels. On a GPU or TPU, `-m gpu` or `-m tpu` runs the
forms of that device.

`--proof=FILE` writes which forms passed how many tests, for `launch.catalog`.
"""

from __future__ import annotations

import contextlib
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
from tests import devices

# For an interpreted form only one case per dtype is fast: the first with two chunks.
SHORT = (64, 65)

FILES = ("test_contract.py", "test_documents.py", "test_product.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", help="JSON file of outcomes by op and form; see launch.catalog")


def pytest_configure(config: pytest.Config) -> None:
    if devices.selected(config.option.markexpr) is None:
        # Triton's decorator reads this variable when a kernel's module is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    path: Any = config.getoption("--proof", default=None)
    if path:
        config.pluginmanager.register(Proof(Path(path)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = devices.selected(config.option.markexpr)
    seen: set[tuple[str, ...]] = set()
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if here is not None:
            # A form that is not for one device runs on all of them.
            if "form" in params and device.TARGETS.get(params["form"], here) == here:
                item.add_marker(here)
            continue
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
def interpreted(pytestconfig: pytest.Config) -> Iterator[None]:
    """Interprets Pallas kernels, unless the run is for their device."""
    is_here = devices.selected(pytestconfig.option.markexpr) is not None
    with contextlib.nullcontext() if is_here else device.interpreted():
        yield


class Proof:
    """Counts the outcomes of tests that name an op and a form."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)  # a bad path fails before the tests run
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
