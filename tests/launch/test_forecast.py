"""launch.forecast as a process, with default flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lm import launched
from tests.lm.launched import ROOT


def forecast(*flags: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launch.forecast", *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses of four tiny sizes, four lengths and three seeds that follow a law of compute."""
    rows = [
        {
            "body_parameters": size,
            "tokens": tokens,
            "loss": 1.5 + 3e3 / (6 * size * tokens) ** 0.4 + 1e-3 * seed,
            "learning_rate": 0.01,
            "batch_tokens": 64,
            "seed": seed,
            "trunk": f"{size} {seed}",
            "status": "done",
        }
        for size in (10, 20, 40, 80)
        for tokens in (1000, 2000, 4000, 8000)
        for seed in range(3)
    ]
    path = tmp_path_factory.mktemp("forecast") / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_forecast_is_written_with_default_flags(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "forecast.json"
    run = launched.arguments(**{"run.length": "20 steps"})
    done = forecast(f"--table={table}", "--law=compute", f"--out={out}", *run)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())["forecast"]
    assert made["rows"] == 48
    assert made["low"] < made["loss"] < made["high"]
    again = forecast(f"--table={table}", "--law=compute", f"--out={out}", *run)
    assert again.returncode == 2
    assert "exists, and a forecast is never overwritten" in again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bootstraps=1"], "flag --bootstraps=1"),
        (["--factor=-1"], "flag --factor=-1"),
        (["--most_compute=1"], "--most_compute=1 leaves no row of"),
        (["--most_compute=6e4"], "see what espalier fit says of this table"),
    ],
)
def test_mistakes(flags: list[str], message: str, table: Path, tmp_path: Path) -> None:
    run = launched.arguments(**{"run.length": "20 steps"})
    out = f"--out={tmp_path / 'x.json'}"
    done = forecast(f"--table={table}", "--law=compute", out, *run, *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.json").exists()
