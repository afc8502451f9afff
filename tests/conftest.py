"""Eight CPU devices for every test, unless the run selects real ones (-m gpu, -m tpu)."""

from __future__ import annotations

import os
import re

import pytest


def pytest_configure(config: pytest.Config) -> None:
    selected = re.sub(r"not \w+", "", config.option.markexpr)
    if not re.search(r"\b(gpu|tpu)\b", selected):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
