"""What `--config` names: mistakes in the name, its argument or its kind are one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import presets

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("command", "config", "message"),
    [
        ("compare", "quickstart", "is a run, not a study; use espalier train, or name a study"),
        ("recall", "quickstart:softmax", "is a run, not a study; use espalier train"),
        ("train", "compare:smoke", "is a study, not a run; use espalier compare"),
        ("train", "recall:smoke", "is a study, not a run; use espalier recall"),
        ("compare", "compare:smok", ": there is no preset 'smok'; presets: smoke, "),
    ],
)
def test_a_configuration_of_another_command_is_one_line(
    tmp_path: Path, command: str, config: str, message: str
) -> None:
    words = [sys.executable, "-m", f"launch.{command}", f"--config={config}", "--workdir=runs"]
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    start = f"error: --config={config}" + ("" if message.startswith(":") else " ")
    assert done.returncode == 2
    assert done.stderr.startswith(start + message)
    assert done.stderr.count("\n") == 1


def test_the_list_says_which_presets_take_an_argument() -> None:
    forms = presets.forms()
    assert {"base", "quickstart[:ARG]", "compare[:ARG]", "annealing:ARG"} <= set(forms)
    assert [form.split(":")[0].rstrip("[") for form in forms] == presets.names()
