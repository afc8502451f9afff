"""The wheel holds what is needed outside a checkout: presets, tables and the console command."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lm import extras
from tests.launch import stand_ins

ROOT = Path(__file__).resolve().parents[2]
MINE = """
from experiments import quickstart

def get_config():
    config = quickstart.get_config()
    config.model.update({"width": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2})
    config.model.ffn_dim = 48
    config.data.tokenizer.update({"kind": "bytes", "vocab_size": 257})
    config.data.update({"context_length": 64, "batch_size": 2})
    config.data.sources = {
        "mine": {"path": "mine.txt", "text_key": "text", "weight": 1.0, "valid_fraction": 0.2}
    }
    config.run.length = "4 steps"
    config.schedule.warmup = "1 steps"
    config.log.samples = ()
    return config
"""
TABLES = ("kernels/measured/tpu_v5.json", "kernels/proofs/cpu.json", "lm/constraints.txt")
TABLES += ("lm/targets/h100.txtpb", "experiments/recall/config.py", "experiments/quickstart.py")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None,
    reason=f"setuptools is not installed: {extras.command('dev')}",
)
def test_a_text_is_trained_on_outside_the_checkout(tmp_path: Path) -> None:
    """This works in a folder of the user that has packages with our names."""
    source, site, user = (tmp_path / name for name in ("source", "site", "user"))
    stand_ins.git(tmp_path, "clone", "-q", str(ROOT), str(source))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("espalier_lm-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert set(TABLES) <= set(names)
    assert not [name for name in names if name.startswith("tests/")]

    for name in ("launch", "lm", "kernels", "experiments"):
        (user / name).mkdir(parents=True)
        (user / name / "__init__.py").touch()
    (user / "mine.py").write_text(MINE)
    (user / "mine.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    env = os.environ | {"PYTHONPATH": str(user), "ESPALIER_DATA": str(tmp_path / "data")}
    env |= {"JAX_NUM_CPU_DEVICES": "1"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(site / "espalier.py"), *words]
        return subprocess.run(line, cwd=user, env=env, capture_output=True, text=True)

    done = call("train", "--config=mine.py", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert "validation mine: " in done.stdout
    assert (user / "run" / "report.html").is_file()
    done = call("catalog", "--config=base")
    assert "passed" in done.stdout, done.stderr
    done = call("numbers")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{site} is not a checkout" in done.stderr
