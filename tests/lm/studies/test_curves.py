"""How far apart the curves of two runs are."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lm.report import folder
from lm.studies import curves
from tests.lm import test_report

ROOT = Path(__file__).resolve().parents[3]


def changed(tmp_path: Path, name: str, key: str, step: int, factor: float) -> Path:
    workdir = test_report.make(tmp_path / name)
    records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["step"] == step:
            record[key] *= factor
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    return workdir


def test_the_largest_difference_is_found_with_its_step(tmp_path: Path) -> None:
    paths = [test_report.make(tmp_path / "a"), changed(tmp_path, "b", "train/loss", 5, 1.01)]
    found = curves.differences(*folder.load(paths))
    assert found["train/loss"].step == 5
    assert found["train/loss"].relative == pytest.approx(0.01 / 1.01)
    assert found["optim/grad_norm"].relative == 0.0
    assert not [key for key in found if key.startswith("time/")]


def test_a_loss_that_is_not_finite_is_infinitely_far(tmp_path: Path) -> None:
    paths = [test_report.make(tmp_path / "a"), changed(tmp_path, "b", "train/loss", 5, math.nan)]
    assert math.isinf(curves.differences(*folder.load(paths))["train/loss"].relative)


def test_the_command_says_which_differ(tmp_path: Path) -> None:
    one = test_report.make(tmp_path / "a")
    other = changed(tmp_path, "b", "train/loss", 5, 1.01)
    out = tmp_path / "out.json"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.same_curve", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    found = run(str(one), str(other), f"--out={out}")
    assert found.returncode == 1, found.stderr
    assert "train/loss: 9.90e-03 at step 5" in found.stdout
    numbers = json.loads(out.read_text())["numbers"]
    assert "9.9e-03 at step 5" in numbers["largest relative difference of train/loss"]
    assert run(str(one), str(other), "--tolerance=0.02").returncode == 0
    alone = run(str(one))
    assert alone.returncode == 2
    assert alone.stderr.endswith("two runs are compared, 1 were named; name A and B\n")
