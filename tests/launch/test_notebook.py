"""notebooks/espalier.ipynb: clean as committed, and its cells run, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm import metrics
from lm.run import checkpoint

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "espalier.ipynb"
STEPS = 6
# What a kernel does, less the display of what a cell ends with.
EXECUTE = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
namespace = {"__name__": "__main__"}
for number, source in enumerate(sources):
    exec(compile(source, f"<code cell {number}>", "exec"), namespace)
"""


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_is_clean() -> None:
    """No outputs, no address, nothing but Python: no magics."""
    for cell in cells():
        source = "".join(cell["source"])
        assert source.strip()
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile(source, "cell", "exec")
        assert "://" not in source


def execute(folder: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {
        "ESPALIER_NOTEBOOK_STEPS": str(STEPS),
        "ESPALIER_NOTEBOOK_WORKDIR": str(folder / "a run"),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "MPLBACKEND": "agg",
    }
    return subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK)],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def test_outside_a_checkout_it_asks_for_one(tmp_path: Path) -> None:
    done = execute(tmp_path, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("No checkout here: set REPOSITORY above")


@pytest.mark.slow
def test_trains_draws_asks_and_writes(tmp_path: Path) -> None:
    done = execute(tmp_path, ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    assert checkpoint.steps(tmp_path / "a run")[-1] == STEPS
    records = metrics.read(tmp_path / "a run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert "eval/stdlib/loss" in records[-1]
    for shown in ("bits_per_byte", "loss at", "def read(self, size=-1):\n", "class Queue:\n"):
        assert shown in done.stdout
