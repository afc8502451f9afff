"""With --json, stdout holds one JSON object and nothing else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from launch import result
from tests.lm import launched
from tests.lm import test_report as run_folder

ROOT = launched.ROOT


def answer(command: str, *words: str, cwd: Path) -> tuple[int, dict[str, Any], str]:
    """Runs a command with --json; returns its status, the object on stdout, and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *words, "--json"],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(cwd)},
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_report(tmp_path: Path) -> None:
    runs = [str(run_folder.make(tmp_path / name)) for name in ("one", "two")]
    status, values, message = answer("report", *runs, cwd=tmp_path)
    assert (status, message.strip()) == (0, values["report"])
    assert [run["workdir"] for run in values["runs"]] == runs
    first = values["runs"][0]
    assert first["step"] == 40
    assert first["validation_bits_per_byte"]["stdlib"] == pytest.approx(5.0 / 40**0.2)
    assert first["loss"] > 0
    assert first["config"]["model"]["width"]


def test_plan(tmp_path: Path) -> None:
    words = ["--config=quickstart", "--target=v5e-4", "--nocompile", "--output="]
    status, values, message = answer("plan", *words, cwd=tmp_path)
    assert status == 0, message
    assert values["config"]["model"]["width"] > 0
    assert values["target"]["name"] == "v5e-4"
    assert "v5e-4" in message
    assert not [*tmp_path.glob("*.json")]


def test_a_comparison_is_judged(tmp_path: Path) -> None:
    page = ROOT / "experiments" / "length" / "compare.json"
    status, values, message = answer("compare", f"--recheck={page}", cwd=tmp_path)
    assert (status, values["all_stand"]) == (0, True)
    assert values["verdicts"] == message.splitlines()


def test_a_mistake_leaves_stdout_empty(tmp_path: Path) -> None:
    assert answer("report", "absent", cwd=tmp_path) == (
        2,
        {},
        "error: absent: no such run folder\n",
    )


def test_numbers_that_are_not_finite_are_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = flags.FlagValues()
    flags.DEFINE_bool("json", True, "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(result, "_given", {})
    with result.printed():
        print("for people")
        result.give({"loss": math.nan, "of": [1.5, {"a": -math.inf}]})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": "nan", "of": [1.5, {"a": "-inf"}]}
    assert err == "for people\n"
