"""Any mixer, or any op together with its mixers, can be deleted without another edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import dispatch
from lm import families

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "lm", "launch", "experiments", "tests", "results", "docs")
SHORT = (
    "model.width=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.ffn_dim=32",
    "data.tokenizer.kind=bytes",
    "data.tokenizer.vocab_size=300",
    "data.context_length=64",
    "data.batch_size=2",
    "schedule.warmup=0 steps",
    "run.length=3 steps",
    "evaluate.max_tokens=256",
    "log.samples=()",
)


def mixers_of(op: str) -> list[str]:
    """Mixers whose file names the op, directly or through a module that it imports."""
    inside = [p.stem for p in (ROOT / "lm/modules").glob("*.py") if f'"{op}"' in p.read_text()]
    words = [f'"{op}"', *(f"lm.modules.{name} " for name in inside)]
    sources = {name: (ROOT / f"lm/mixers/{name}.py").read_text() for name in names()}
    return [name for name, text in sources.items() if any(word in text for word in words)]


def names() -> tuple[str, ...]:
    return families.MIXERS.names()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixers", "op"), [(["retnet"], None), (mixers_of("delta_rule"), "delta_rule")], ids=str
)
def test_the_rest_stands_without_it(tmp_path: Path, mixers: list[str], op: str | None) -> None:
    copy = tmp_path / "copy"
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")):
        shutil.copy(path, copy)
    for name in mixers:
        (copy / f"lm/mixers/{name}.py").unlink()
        (copy / f"tests/lm/mixers/test_{name}.py").unlink()
    if op is not None:
        shutil.rmtree(copy / "kernels" / op)

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(copy), "JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=copy, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stdout.decode()[-3000:] + done.stderr.decode()[-3000:]
        return done.stdout.decode()

    run("pytest", "--collect-only", "-q")
    run("pytest", "-q", "tests/test_architecture.py")
    run("launch.catalog", f"--out={copy / 'catalog.json'}")
    listed = json.loads((copy / "catalog.json").read_text())
    assert not {row["mixer"] for row in listed["mixers"]} & set(mixers)
    assert {row["op"] for row in listed["forms"]} == set(dispatch.names()) - {op}
    pattern = next(name for name in names() if name not in mixers)
    overrides = [f"--config.{item}" for item in (*SHORT, f"model.pattern={pattern}")]
    data, workdir = f"--data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"
    run("launch.train", "--config=experiments/base.py", data, workdir, *overrides)
    assert (tmp_path / "run" / "report.html").exists()
