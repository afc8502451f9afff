"""Two checkouts train the same tiny runs: are the numbers equal bit for bit?

    cases -> in each checkout, a process per case: python -m launch.train --config=... --workdir=...
          -> every number of every record of metrics.jsonl except the timings, and the sum of every
             array of the last checkpoint

Each side runs its own code, so only its user interface is used: launch.train, the keys of
experiments/base.py, the files of a run folder. `SPELLINGS` says how earlier checkouts spell a case.
Each side compiles for itself, on CPU devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from lm import files, metrics
from lm.config import UserError, flatten, nearest
from lm.run.progress import GridBar

GROUPS = ("mixers", "meshes", "accumulation", "settings")
THIS = Path(__file__).resolve().parents[2]

# Two layers whose widths all differ, two chunks of time, two sources.
SMOKE: dict[str, Any] = {
    "model.width": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.ffn_dim": 48,
    "mup.base_width": 16.0,
    "data.tokenizer.kind": "bytes",
    "data.tokenizer.vocab_size": 257,
    "data.context_length": 96,
    "data.batch_size": 4,
    "schedule.peak_learning_rate": 0.02,
    "schedule.warmup": "25 percent",
    "loss.chunk_size": 100,
    "evaluate.every": "50 percent",
    "evaluate.max_tokens": 512,
    "checkpoint.every": "100 percent",
    "log.samples": (),
}
# Axes of two devices each, and a switch of the mesh.
MESHES: dict[tuple[str, ...], str] = {
    ("data",): "",
    ("data", "fsdp"): "zero1",
    ("fsdp",): "",
    ("tensor",): "",
    ("fsdp", "tensor"): "stream_over_tensor",
}
ALL_AXES = ("data", "fsdp", "tensor")
SETTINGS: dict[str, dict[str, Any]] = {
    "wsd": {
        "schedule.family": "wsd",
        "schedule.decay": "50 percent",
        "schedule.decay_shape": "sqrt",
        "optimizer.weight_decay_mode": "independent",
        "data.packing": "best_fit",
    },
    "cosine": {
        "schedule.family": "cosine",
        "schedule.horizon": "80 percent",
        "optimizer.weight_decay_mode": "width_invariant",
        "loss.z_loss": 1e-3,
    },
    "bfloat16": {"model.precision": "bfloat16", "model.remat": "full"},
    "standard": {
        "mup.parametrization": "standard",
        "mup.embedding_multiplier": 1.0,
        "mup.residual_multiplier": 1.0,
        "model.tied_embeddings": False,
        "model.unroll": True,
    },
}


def _without_families(values: dict[str, Any]) -> dict[str, Any]:
    """One schedule with the keys of all schedules."""
    old = {
        "mesh.stream_over_tensor": "mesh.sequence_parallel",
        "schedule.horizon": "schedule.decay",
    }
    values = {old.get(key, key): value for key, value in values.items()}
    if values.get("schedule.family") == "cosine":
        values["schedule.decay_shape"] = "cosine"
    return values


# A key of experiments/base.py that later checkouts lack -> a function that turns the spelling of
# the next newer checkouts into that of checkouts with the key; the newest first.
SPELLINGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "schedule.decay_from": _without_families
}
_ASK = """
import json, lm
from experiments import base
print(json.dumps([lm.__file__, base.get_config().to_dict()]))
"""


@dataclass(frozen=True)
class Case:
    """One run: its changes to `SMOKE`, and its number of devices."""

    name: str
    changes: Mapping[str, Any]
    num_devices: int = 1


@dataclass(frozen=True)
class Checkout:
    """`keys` and `pattern` of experiments/base.py; `commit` is "" if a file differs from it."""

    root: Path
    mixers: frozenset[str]
    keys: frozenset[str]
    pattern: Any
    commit: str


class Run(NamedTuple):
    """`records` without timings; `digest`: the sum of every array of the last checkpoint."""

    records: list[dict[str, Any]]
    digest: dict[str, int]


class Verdict(NamedTuple):
    """`differences` says in words what is not equal, the first difference first. If it is empty,
    `num_records` and `num_arrays` are equal.
    """

    case: str
    differences: list[str]
    num_records: int
    num_arrays: int


def look(root: Path) -> Checkout:
    """Inspects a folder as a checkout.

    Raises:
      UserError: it is not a checkout, or its processes run other code.
    """
    root = root.expanduser().absolute()
    if not (root / "launch" / "train.py").is_file():
        raise UserError(f"{root} is not a checkout: it has no launch/train.py; name another folder")
    command = [sys.executable, "-c", _ASK]
    asked = subprocess.run(command, cwd=root, env=_environment(root, 1), **_CAPTURED)
    if asked.returncode:
        raise UserError(
            f"{root}: experiments/base.py cannot be read: {files.last_line(asked.stderr)}"
        )
    place, values = json.loads(asked.stdout)
    if not Path(place).is_relative_to(root):
        raise UserError(f"{root}: its processes import {place}; name the folder that holds lm/")
    names = {path.stem for path in (root / "lm" / "mixers").glob("[a-z]*.py")}
    pattern = values["model"]["pattern"]
    return Checkout(root, frozenset(names), frozenset(flatten(values)), pattern, _commit(root))


def cases(groups: Sequence[str], mixers: Sequence[str]) -> list[Case]:
    """The runs of some of `GROUPS`: every mixer alone; the first mixer on several meshes, with
    accumulation and with other settings; one layer of every mixer on all axes of a mesh at once.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise UserError(f"--cases={unknown[0]} is not a group; {nearest(unknown[0], GROUPS)}")
    first = {"model.pattern": mixers[0]}
    every = {"model.pattern": ",".join(mixers), "model.num_layers": len(mixers)}
    found = {
        "mixers": [Case(f"mixer {name}", {"model.pattern": name}) for name in mixers],
        "meshes": [_mesh(axes, switch, first) for axes, switch in MESHES.items()],
        "accumulation": [Case("accumulation=2", first | {"run.accumulation": 2})],
        "settings": [Case(f"setting {name}", first | x) for name, x in SETTINGS.items()],
    }
    found["meshes"].append(_mesh(ALL_AXES, "", every))
    return [case for group in GROUPS if group in groups for case in found[group]]


def _mesh(axes: Sequence[str], switch: str, changes: Mapping[str, Any]) -> Case:
    sizes: dict[str, Any] = {"mesh.data": 1} | {f"mesh.{axis}": 2 for axis in axes}
    name = " ".join(["mesh", *(f"{axis}=2" for axis in axes), *[switch][: bool(switch)]])
    switched = {f"mesh.{switch}": True} if switch else {}
    return Case(name, {**changes, **sizes, **switched}, 2 ** len(axes))


def compare(
    sides: tuple[Checkout, Checkout],
    asked: Sequence[Case],
    folder: Path,
    *,
    steps: int,
    added: Sequence[str],
) -> Iterator[Verdict]:
    """Trains every case in both checkouts, the older first, and yields what differs.

    Runs of a commit without changes are kept in `folder` and not repeated. `added` are patterns for
    names of records and arrays that only the second side may have.
    """
    folder = folder.absolute()
    _write_corpus(folder / "corpus")
    with GridBar(len(asked)) as bar:
        for case in asked:
            bar.update(case.name, steps, "training")
            runs = _train(sides, case, folder, steps)
            failed = [found for found in runs if isinstance(found, str)]
            old, new = runs
            if isinstance(old, str) or isinstance(new, str):
                verdict = Verdict(case.name, failed, 0, 0)
            else:
                verdict = Verdict(
                    case.name, differences(old, new, added), len(new.records), len(new.digest)
                )
            bar.update(case.name, 0, "")
            yield verdict


def differences(old: Run, new: Run, added: Sequence[str] = ()) -> list[str]:
    """What differs between two runs: names that one lacks, then numbers in the order of steps, then
    arrays.

    >>> differences(Run([{"step": 1, "train/loss": 5.5}], {}), Run([{"step": 1}], {}))
    ['only the other checkout has train/loss']
    """
    logged = [{key for record in run.records for key in record} for run in (old, new)]
    found = _lonely(logged[0] | old.digest.keys(), logged[1] | new.digest.keys(), added)
    counts = [len(run.records) for run in (old, new)]
    if counts[0] != counts[1]:
        found.append(f"{counts[0]} records != {counts[1]}")
    both = logged[0] & logged[1]
    for a, b in zip(old.records, new.records, strict=False):
        for key in (key for key in a | b if key in both):
            if repr(a.get(key)) != repr(b.get(key)):  # NaN counts as equal to NaN
                found.append(f"step {a['step']}, {key}: {a.get(key)!r} != {b.get(key)!r}")
    arrays = [name for name, value in old.digest.items() if new.digest.get(name, value) != value]
    if arrays:
        found.append(f"{len(arrays)} of {len(old.digest)} final arrays, the first {arrays[0]}")
    return found


def _lonely(old: set[str], new: set[str], added: Sequence[str]) -> list[str]:
    extra = [name for name in new - old if not any(fnmatch(name, x) for x in added)]
    found = [f"only the other checkout has {name}" for name in sorted(old - new)]
    return found + [f"only this checkout has {name}" for name in sorted(extra)]


def _train(
    sides: tuple[Checkout, Checkout], case: Case, folder: Path, steps: int
) -> list[Run | str]:
    """For each side the run, or why there is none. Both train at the same time."""
    found: list[Run | str] = []
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_started(side, case, folder, steps)) for side in sides]
        for side, (process, workdir) in zip(sides, started, strict=True):
            err = process.communicate()[1] if process else ""
            if process and process.returncode:
                found.append(f"{side.root} fails: {files.last_line(err)}")
            else:
                found.append(_read(workdir))
    return found


@contextlib.contextmanager
def _started(
    side: Checkout, case: Case, folder: Path, steps: int
) -> Iterator[tuple[subprocess.Popen[str] | None, Path]]:
    """A training under way (None if its run already exists), and its run folder."""
    given = _values(side, case, folder, steps)
    arguments = [f"--config.{key}={value}" for key, value in given.items()]
    mark = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:8]
    room = folder / side.commit if side.commit else Path(tempfile.mkdtemp(dir=folder))
    workdir = room / f"{case.name.replace(' ', '-')}-{mark}"
    if (workdir / "checkpoints" / str(steps)).exists():
        yield None, workdir
        return
    command = [sys.executable, "-m", "launch.train", "--config=experiments/base.py", *arguments]
    command += [f"--workdir={workdir}", f"--data_dir={room / 'data'}"]
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = _environment(side.root, case.num_devices)
    with subprocess.Popen(command, cwd=side.root, env=environment, **pipes) as process:
        try:
            yield process, workdir
        finally:
            process.kill()


def _values(side: Checkout, case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The keys of a case as the checkout spells them, and their values."""
    source = {"text_key": "text", "valid_fraction": 0.3}
    sources = {
        "most": source | {"path": str(folder / "corpus" / "0*.txt"), "weight": 2.0},
        "rest": source | {"path": str(folder / "corpus" / "1*.txt"), "weight": 1.0},
    }
    values = SMOKE | {"data.sources": sources, "run.length": f"{steps} steps"} | dict(case.changes)
    for key, spelled in SPELLINGS.items():
        if key in side.keys:
            values = spelled(values)
    return values


def _read(workdir: Path) -> Run:
    """Reads files that every commit writes in the same way, whatever this one's readers expect."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    digest = json.loads((newest / "meta" / "metadata").read_text())["digest"]
    lines = metrics.read(workdir)
    return Run([{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines], digest)


_CAPTURED: Any = {"capture_output": True, "text": True, "check": False}


def _environment(root: Path, num_devices: int) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    platform = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    # Python finds bytecode by a file's second and size, so it could miss an edit after a run.
    return inherited | platform | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def _commit(root: Path) -> str:
    """The commit of all files; "" if a file differs, or if `root` is not a work tree."""
    git = ["git", "--no-optional-locks", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--show-toplevel", "HEAD"], **_CAPTURED)
    changes = subprocess.run([*git, "status", "--porcelain"], **_CAPTURED)
    top, _, commit = head.stdout.strip().partition("\n")
    is_exact = not head.returncode and Path(top) == root.resolve() and not changes.stdout.strip()
    return commit if is_exact else ""


def _write_corpus(folder: Path) -> None:
    """Writes twenty documents of unequal lengths, 00.txt to 19.txt, the same everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    letters = "eeetttaaooinshrdlu  éü\n"
    for i in range(20):
        text = "".join(letters[int(rng.random() * len(letters))] for _ in range(200 + 60 * i))
        if not (folder / f"{i:02}.txt").exists():  # a newer time would prepare the data again
            (folder / f"{i:02}.txt").write_bytes(text.encode())
