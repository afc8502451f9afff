"""Random input is refused in one line before a device is initialized, or not refused at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def fuzzed(**counts: int) -> str:
    """The output of the module in a new process, which has not looked for devices."""
    flags = [f"--{name}={count}" for name, count in counts.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.fuzz", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_random_cases_have_no_fault() -> None:
    """The first configurations and lines of the slow test below, without work on a device."""
    message = fuzzed(seed=0, configs=60, lines=25, damages=0, late=0)
    assert "refused" in message
    assert "came to a device" in message


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_many_random_cases_have_no_fault(seed: int) -> None:
    message = fuzzed(seed=seed, configs=500, lines=300, damages=80, late=500)
    for kind in ("refused", "came to a device", "accepted late"):
        assert kind in message
