"""Makes the run folders of a commit that later commits must be able to read, and the results of
that commit when it resumes them.

    git checkout 40eb06f && python PATH/OF/THIS/make.py FOLDER

Run this in a checkout of that commit, with this file from outside it; FOLDER then holds

    NAME.tar.xz     a run folder without its report and TensorBoard's events, for every name of RUNS
    numbers.json    the CPU that made them and, by name, the records that the commit wrote when it
                    resumed the folder to its end, the sums of the final arrays, and the samples

The paths in the configurations are relative. A run is resumed in a folder that holds corpus/, which
`write_corpus` wrote, and the run folders it started from, under their names.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

WORDS = ("the", "quick", "fox", "jumps", "over", "été", "naïve", "def", "f(x):", "return x + 1")
# Orbax writes the absolute path of a checkpoint into commit_success.txt and does not read it back.
LEFT_OUT = ("report.html", "report_figures", "tensorboard", ".lock", "commit_success.txt")
SOURCE = {"path": "corpus/*.txt", "text_key": "text", "weight": 1.0, "valid_fraction": 0.3}

# As small as a run with two layers in two groups can be.
SMALL: dict[str, Any] = {
    "data.sources": {"text": SOURCE},
    "model.width": 4,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 2,
    "model.ffn_dim": 8,
    "model.pattern": "softmax",
    "mup.base_width": 2.0,
    "data.tokenizer.kind": "bytes",
    "data.tokenizer.vocab_size": 257,
    "data.context_length": 32,
    "data.batch_size": 4,
    "schedule.warmup": "256 tokens",
    "run.length": "24 steps",
    "evaluate.every": "8 steps",
    "evaluate.max_tokens": 256,
    "checkpoint.every": "12 steps",
    "log.samples": (),
}
# Name -> what differs. `WHOLE` are finished; the others are stopped before their end. `branch`
# decays from the trunk.
RUNS: dict[str, dict[str, Any]] = {
    "finished": {"log.samples": ("the quick",), "log.sample_tokens": 8},
    "interrupted": {
        "model.layers": {"local": {"mixer": "softmax", "window": 8, "mlp": "none"}},
        "model.pattern": "local,softmax",
        "data.packing": "best_fit",
        "schedule.family": "cosine",
        "schedule.decay_shape": "cosine",
        "optimizer.weight_decay_mode": "independent",
        "loss.z_loss": 1e-4,
        "run.accumulation": 2,
    },
    "trunk": {"schedule.family": "wsd", "schedule.decay": "0 steps"},
    "branch": {
        "schedule.family": "wsd",
        "schedule.decay": "16 steps",
        "schedule.decay_shape": "sqrt",
        "schedule.decay_from": "trunk",
    },
    "tuned": {"init_from": "finished/checkpoints/12", "schedule.peak_learning_rate": 0.01},
}
WHOLE = ("finished", "trunk")


def write_corpus(folder: Path) -> None:
    """Writes twenty documents, the same on every machine."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(20):
        words = [WORDS[int(rng.random() * len(WORDS))] for _ in range(120)]
        (folder / f"{i:02}.txt").write_bytes(" ".join(words).encode())


def cpu() -> str:
    """A hash of the processor and its features: only the same processor adds in the same order."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    kept = [facts.get(key) for key in ("vendor_id", "cpu family", "model", "flags")]
    cores = len(os.sched_getaffinity(0))
    return hashlib.sha256(json.dumps([*kept, cores]).encode()).hexdigest()[:16]


def numbers(workdir: Path) -> dict[str, Any]:
    """The records without timings, the sums of the newest checkpoint's arrays, and the samples."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    samples = (workdir / "samples.jsonl").read_text().splitlines()
    return {
        "records": [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records],
        "digest": json.loads((newest / "meta" / "metadata").read_text())["digest"],
        "samples": [json.loads(line) for line in samples],
    }


def _train(workdir: Path, *, is_stopped: bool) -> None:
    flags = [f"--config.{key}={value}" for key, value in (SMALL | RUNS[workdir.name]).items()]
    command = [sys.executable, "-m", "launch.train", "--config=base.py", *flags]
    command += [f"--workdir={workdir.name}", "--data_dir=data"]
    checkout = {"PYTHONPATH": str(Path.cwd())}
    environment = checkout | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(command, cwd=workdir.parent, env=os.environ | environment)
    metrics = workdir / "metrics.jsonl"
    while is_stopped and process.poll() is None:
        if metrics.exists() and metrics.stat().st_size:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.001)
    if process.wait():
        raise SystemExit(f"{workdir.name} ended with status {process.returncode}")


def _pack(workdir: Path, archive: Path) -> None:
    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if Path(entry.name).name in LEFT_OUT:
            return None
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(archive, "w:xz", preset=9) as file:
        file.add(workdir, workdir.name, filter=kept)


def main(folder: Path) -> None:
    room = folder / "room"
    write_corpus(room / "corpus")
    shutil.copy("experiments/base.py", room)  # run.json keeps the command, so no absolute path
    found: dict[str, Any] = {"cpu": cpu()}
    for name in RUNS:
        _train(room / name, is_stopped=name not in WHOLE)
        _pack(room / name, folder / f"{name}.tar.xz")
        if name in WHOLE:
            # A run that is killed leaves records beyond its checkpoint, and no end.
            shutil.rmtree(room / name / "checkpoints" / "24")
        _train(room / name, is_stopped=False)
        found[name] = numbers(room / name)
    text = json.dumps(found, indent=None, separators=(",", ":"), ensure_ascii=False)
    (folder / "numbers.json").write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(room)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
