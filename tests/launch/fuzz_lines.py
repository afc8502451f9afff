"""Random command lines and damaged runs (tests/launch/fuzz.py)."""

from __future__ import annotations

import contextlib
import importlib
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli
from lm.config import UserError
from tests.launch.fuzz_cases import Found, TouchedError, near, run, without_devices
from tests.lm.formats import make

OWN = frozenset(flags.FLAGS)  # the flags of absl

ROOT = Path(__file__).resolve().parents[2]
BASE = "--config={config}"
TINY = """from experiments import base

def get_config():
    config = base.get_config()
    config.data.tokenizer.update({{"kind": "bytes", "vocab_size": 257}})
    config.data.sources.stdlib.path = {path!r}
    return config
"""
RUN = "--checkpoint={run}"
# A line of each command without a mistake that can be found before a device is known.
LINES: dict[str, list[str]] = {
    "bench": ["--cases=train_step"],
    "catalog": [],
    "compare": [f"--config={ROOT}/experiments/compare/config.py:smoke,data", "--workdir=new"],
    "coord_check": [BASE, "--widths=192,384", "--workdir=new"],
    "convert": [RUN, "--pattern=softmax", "--workdir=new"],
    "eval_harness": [RUN, "--tasks=a", "--tasks_dir=."],
    "evaluate": [RUN],
    "export_hf": [RUN, "--folder=new"],
    "generate": [RUN, "--prompt=def "],
    "import_hf": [BASE, "--folder=.", "--workdir=new"],
    "numbers": ["--workdir={run}"],
    "plan": [BASE, "--target=v5e-16"],
    "plan_table": ["--output=new.md", "{text}"],
    "prepare": [BASE],
    "predict_loss": ["{run}", "--schedule=wsd"],
    "recall": [f"--config={ROOT}/experiments/recall/config.py:smoke", "--workdir=new"],
    "recipe": ["--tokens=1e8", "--parameters=1e6"],
    "report": ["{run}"],
    "same_bits": ["{run}"],
    "schedules": [BASE, "--schedule=wsd"],
    "train": [BASE, "--workdir=new", "--data_dir=data"],
    "tune": ["--target=v5e-1"],
    "verify_export": [RUN, "--folder=."],
    "verify_resume": [BASE],
}
ARGUMENTS = ("", " ", "nan", "inf", "-inf", "-1", "0", "1", "1e308", "1e-45", "9" * 30, "9" * 5000)
ARGUMENTS += ("x", "a/b", "gs://a/b", "x" * 300, "x/" * 3000, "../..", "a\udcffb", "a=b", "a.b=c")
ARGUMENTS += ("softmax.window=x", "{", "[1", "[" * 9000, "None", "true", "{folder}", "{text}")
ARGUMENTS += ("{bytes}", "{loop}", "é", "a,b,,c", "x:y", "-", "a\nb", "position", "x.max_items=-1")
CONFIGS = ("seed=nan", "model.width=9223372036854775808", "schedule.a=1e308", "mesh.tensor=3")
CONFIGS += ("schedule=x", "model.pattern=softmax,x", "data.sources={}", "run.length=1e99 steps")
CONFIGS += ("model.layers={{'a': {{'mixer': 'gla', 'form': 'x'}}}}", "model.widht=1", "model=1")


POSITIONAL = ("plan_table", "predict_loss", "report", "same_bits", "verify_resume")


def unpacked(folder: Path) -> Path:
    """Unpacks a finished run from the archives of tests/lm/formats."""
    with tarfile.open(ROOT / "tests/lm/formats/finished.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "finished"


def lines(seed: int, count: int, folder: Path, kept: Path | None) -> Found:
    """Runs `count` command lines in this process; `kept` is the folder of a run, or None."""
    found = Found()
    (folder / "empty").mkdir()
    (folder / "text").write_text("text")
    (folder / "bytes").write_bytes(b"\xff\xfe\0")
    (folder / "loop").symlink_to(folder / "loop")
    places = {"run": kept or folder / "absent", "folder": folder / "empty"}
    places |= {name: folder / name for name in ("text", "bytes", "loop")}
    places["config"] = folder / "tiny.py"
    (folder / "long.txt").write_text("The quick brown fox. " * 999)
    places["config"].write_text(TINY.format(path=str(folder / "long.txt")))
    for n in range(count):
        rng = random.Random(f"{seed} line {n}")
        name = rng.choice(sorted(LINES))
        line = [_filled(x, places) for x in _broken(rng, name)]
        with contextlib.chdir(tempfile.mkdtemp(dir=folder)), without_devices():
            where = f"seed {seed}, line {n}: {name} {' '.join(x[:90] for x in line)!a}"
            run(found, where, lambda name=name, line=line: _launched(name, line))
    return found


def _filled(text: str, places: Mapping[str, Path]) -> str:
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", str(path))
    return text


def _broken(rng: random.Random, name: str) -> list[str]:
    """A command line with one flag that is wrong, misspelled or without a value, or a
    stray word.
    """
    line = list(LINES[name])
    with contextlib.suppress(TouchedError, SystemExit, UserError):
        _defined(name)
    known = sorted(set(flags.FLAGS) - OWN - {"config"})
    kind = rng.choice(("value", "value", "value", "value", "name", "bare", "word", "override"))
    flag = rng.choice(known) if known else "x"
    if kind == "override" and any("--config" in x for x in line):
        return [*line, f"--config.{rng.choice(CONFIGS)}"]
    if kind == "name":
        return [*line, f"--{near(rng, flag)}={rng.choice(ARGUMENTS)}"]
    if kind == "bare":
        return [*line, f"--{flag}"]
    if kind == "word":
        return [*line, rng.choice(ARGUMENTS)]
    return [x for x in line if not x.startswith(f"--{flag}=")] + [
        f"--{flag}={rng.choice(ARGUMENTS)}"
    ]


def _defined(name: str) -> Any:
    """Imports the module of a command again, so that only its flags are defined."""
    for flag in set(flags.FLAGS) - OWN:
        delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()
    sys.modules.pop(f"launch.{name}", None)
    return importlib.import_module(f"launch.{name}")


def _launched(name: str, line: list[str]) -> None:
    """Runs `python -m launch.NAME LINE` in this process. Starting another process, except git,
    counts as a look for a device.
    """

    def popened(command: Any, *rest: Any, **options: Any) -> Any:
        if command[0] != "git":
            raise TouchedError
        return popen(command, *rest, **options)

    module, before = _defined(name), sys.argv
    sys.argv = [f"launch/{name}.py", *line]
    popen, subprocess.Popen = subprocess.Popen, popened  # pyright: ignore[reportAttributeAccessIssue]
    try:
        cli.run(module.main, positional=name in POSITIONAL)
    finally:
        sys.argv, subprocess.Popen = before, popen  # pyright: ignore[reportAttributeAccessIssue]


WAYS: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda p: p.mkdir(),
    "a link to nothing": lambda p: p.symlink_to("nothing"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "empty": lambda p: p.write_bytes(b""),
    "not UTF-8": lambda p: p.write_bytes(b'{"a": "\xff\xfe"}\n'),
    "cut": lambda p: p.write_text('{"a": '),
    "a list": lambda p: p.write_text("[]\n"),
    "an empty object": lambda p: p.write_text("{}\n"),
    "deep": lambda p: p.write_text("[" * 99_999 + "\n"),
    "zeros": lambda p: p.write_bytes(bytes(999)),
}
AGAIN = """import json

def get_config():
    return json.load(open({path!r}))
"""
READERS = ("convert", "evaluate", "export_hf", "generate", "report", "train")
FILES = ("config.json", "run.json", "metrics.jsonl", "samples.jsonl", "tokenizer.json")
FILES += tuple(f"checkpoints/24/{x}/metadata" for x in ("config", "loader", "meta"))
FILES += (
    "checkpoints",
    "checkpoints/24",
    "checkpoints/24/state",
    "checkpoints/24/_CHECKPOINT_METADATA",
)
FILES += ("checkpoints/24/state/manifest.ocdbt", "checkpoints/24/state/_METADATA", "report.html")


def damages(seed: int, count: int, folder: Path, kept: Path) -> Found:
    """Runs `count` commands on a run with one replaced file; they may use devices."""
    found = Found()
    for n in range(count):
        rng = random.Random(f"{seed} damage {n}")
        name, file, way = rng.choice(READERS), rng.choice(FILES), rng.choice(sorted(WAYS))
        with contextlib.chdir(tempfile.mkdtemp(dir=folder)):
            place = Path(shutil.copytree(kept, Path.cwd() / "run"))
            target = place / file
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            WAYS[way](target)
            make.write_corpus(Path("corpus"))
            Path("again.py").write_text(AGAIN.format(path=str(kept / "config.json")))
            again = ["--config=again.py", f"--workdir={place}", "--data_dir=data"]
            line = again if name == "train" else [_filled(x, {"run": place}) for x in LINES[name]]
            where = f"seed {seed}, damage {n}: {name}, {file} is {way}"
            run(found, where, lambda name=name, line=line: _launched(name, line))
    return found
