"""Runs started as a user starts them: one process each, on one device. They share compiled
programs.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lm import metrics
from tests.lm import lab

ROOT = Path(__file__).parents[2]
STEPS = 100
OVERRIDES = {
    "model.width": 32,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.ffn_dim": 48,
    "model.pattern": "softmax",
    "mup.base_width": 32,
    "data.tokenizer.kind": "bytes",
    "data.tokenizer.vocab_size": 257,
    "data.context_length": 32,
    "data.batch_size": 4,
    "schedule.warmup": "256 tokens",
    "run.length": f"{STEPS} steps",
    "evaluate.every": "40 steps",
    "evaluate.max_tokens": 256,
    "checkpoint.every": "30 steps",
    "log.samples": "()",
}


@functools.cache
def folder() -> Path:
    """This session's folder: corpus, prepared data, compiled programs."""
    path = Path(tempfile.mkdtemp(prefix="launched-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    lab.write_corpus(path / "corpus")
    return path


def environment() -> dict[str, str]:
    """Environment variables of a run. A study's child processes inherit them through os.environ."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "ESPALIER_DATA": str(folder() / "data"),
    }


def arguments(**changes: object) -> list[str]:
    """Arguments of launch.train, without --workdir."""
    source = {
        "text": {
            "path": str(folder() / "corpus" / "*.txt"),
            "text_key": "text",
            "weight": 1.0,
            "valid_fraction": 0.3,
        }
    }
    flags = [f"--config.{key}={value}" for key, value in (OVERRIDES | changes).items()]
    return ["--config=experiments/base.py", f"--config.data.sources={source}", *flags]


def command(workdir: Path) -> list[str]:
    return [sys.executable, "-m", "launch.train", *arguments(), f"--workdir={workdir}"]


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    pipe, env = subprocess.PIPE, os.environ | environment()
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env)


def interrupt(process: subprocess.Popen[str], workdir: Path, *, signum: int, step: int) -> None:
    """Sends a signal once the records reach `step`."""
    while process.poll() is None and not any(x["step"] >= step for x in metrics.read(workdir)):
        time.sleep(0.005)
    process.send_signal(signum)
