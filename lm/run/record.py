"""The run folder: its lock, and the files written at the start of every launch.

    config.json    the configuration
    run.json       versions, commit, devices, forms of the layers, parameters, FLOPs per token;
                   digests of config.json and of itself (lm/run/items.py)
    params.txt     the parameter table
    tokenizer.json

A folder belongs to one live run. A second launch in the same folder resumes the run. Its
configuration may differ only in keys marked FREE (lm/mapping.py). Those change the length of a run,
what it logs, on which devices its arrays are, or the order of sums, but never what a step computes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import logging
import operator
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lm import build as build_lib
from lm import files
from lm import params as params_lib
from lm.build import Build
from lm.config import Config, MeshConfig, UserError, difference, to_mapping
from lm.data.tokenizers import Tokenizer
from lm.layers import LayerRecord
from lm.mapping import free_keys
from lm.parallel import processes
from lm.run import checkpoint, formats, items
from lm.run.checkpoint import TOKENIZER

log = logging.getLogger(__name__)

LOCK = ".lock"
WRITTEN = ("config.json", "run.json", "params.txt", TOKENIZER)
_REMOVE = "restore it, or remove it: from a checkpoint of the run it is written anew"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "ml-collections",
)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks the folder for this run; the first process does so. The lock is released when that
    process ends, however it ends. If the folder is new and the run wrote nothing, the folder is
    removed.

    Raises:
      UserError: another live process holds the lock, another command made the folder, the folder
      cannot be created, or some process does not see it.
    """
    if not processes.is_first():
        if not (workdir / LOCK).exists():
            raise UserError(
                f"--workdir={workdir}, made by process 0, is not on {socket.gethostname()}; "
                "choose a folder that all processes share"
            )
        yield
        return
    is_new = not workdir.exists()
    try:
        files.claim(workdir, "train")
        file = open(workdir / LOCK, "a+")  # noqa: SIM115 (held open for as long as the lock)
    except OSError as error:
        message = f"--workdir={workdir}: {error.strerror}; {files.advice(error)}"
        raise UserError(message) from None
    with file:
        if not files.lock(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"--workdir={workdir} is in use by {owner}; stop it or choose another workdir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            written = [p for p in workdir.rglob("*") if p.is_file()]
            if is_new and {p.name for p in written} <= {LOCK, files.MARK}:
                shutil.rmtree(workdir, ignore_errors=True)


def check_unchanged(workdir: Path, config: Config) -> None:
    """Refuses a folder that holds a different run.

    Raises:
      UserError: keys that are not FREE differ; the message lists the differences.
    """
    old = _config(workdir)
    if old is None:
        return
    free = free_keys(config)
    changed = {
        key: values
        for key, values in difference(to_mapping(old), to_mapping(config)).items()
        if not any(f"{key}.".startswith(f"{name}.") for name in free)
    }
    for name in [key for key in changed if key.endswith(".family")]:
        # When the member changes, all its options differ; the name alone says enough.
        group = name.removesuffix("family")
        changed = {k: x for k, x in changed.items() if k == name or not k.startswith(group)}
    if changed:
        shown = "; ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in list(changed.items())[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"--workdir={workdir} holds a run with another config ({shown}{more}); choose a new "
            "workdir"
        )


def _config(workdir: Path) -> Config | None:
    """The configuration of the run in a folder, read from its newest checkpoint if config.json is
    lost; None if the folder holds no run.
    """
    path = workdir / "config.json"
    if not path.exists():
        return checkpoint.newest(workdir)[0] if checkpoint.steps(workdir) else None
    try:
        old = json.loads(path.read_text())
    except ValueError:
        old = None
    if not isinstance(old, dict):
        raise UserError(f"{path} is not a configuration; {_REMOVE}")
    return formats.read(old, str(path))


def recorded(workdir: Path, *keys: str) -> Any:
    """An entry of the run.json that an earlier launch wrote, such as recorded("tokenizer",
    "sha256"); None without that file.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "run.json"
    if not path.exists():
        return None
    try:
        return functools.reduce(operator.getitem, keys, json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; {_REMOVE}") from None


def write(
    workdir: Path,
    built: Build,
    tokenizer: Tokenizer,
    data: dict[str, Any],
    decay_start: float | None,
    until: Mapping[str, float] = MappingProxyType({}),
    *,
    lost_until: int = 0,
) -> None:
    """Writes the four files, each atomically. run.json also gets `data` (what the loader reads),
    `until` as in `lm.train.Options`, and the step up to which lost records were given up.
    """
    description = describe(built, tokenizer, data)
    description |= {"decay_start": decay_start, "until": dict(until)}
    if lost_until := max(lost_until, _old(workdir).get("records_lost_until_step", 0)):
        description |= {"records_lost_until_step": lost_until}
    config = formats.write(built.config)
    description |= {"config_sha256": items.sha256(config)}
    description |= {"sha256": items.sha256(description)}
    files.replace(workdir / "config.json", json.dumps(config, indent=2) + "\n")
    files.replace(workdir / "params.txt", params_lib.table(built.infos))
    files.replace(workdir / "run.json", json.dumps(description, indent=2) + "\n")
    tokenizer.save(workdir / TOKENIZER)


def _old(workdir: Path) -> dict[str, Any]:
    """The run.json of the previous launch; {} if there is none that can be read."""
    try:
        old = json.loads((workdir / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return old if isinstance(old, dict) else {}


def warn_of_changes(workdir: Path, built: Build) -> None:
    """What differs from the launch before: files that are gone, other devices."""
    absent = [name for name in WRITTEN if not (workdir / name).exists()]
    if checkpoint.steps(workdir) and absent:
        log.warning("%s lacks %s: written anew", workdir, ", ".join(absent))
    _warn_of_other_devices(workdir, built)


def _warn_of_other_devices(workdir: Path, built: Build) -> None:
    old, config = _old(workdir), _config(workdir)
    if config is None or not {"mesh", "processes"} <= old.keys():
        return
    before = old["mesh"], _split(config.mesh, old["mesh"]), old["processes"]
    mesh = dict(built.mesh.shape)
    now = mesh, _split(built.config.mesh, mesh), processes.count()
    if before != now:
        log.warning(
            "%s: from mesh %s%s of %d processes to mesh %s%s of %d: the same numbers, summed in "
            "another order",
            workdir,
            *before,
            *now,
        )


def _split(config: MeshConfig, mesh: Mapping[str, int]) -> str:
    """How rows are split over time; "" if they are whole."""
    if mesh["sequence"] == 1:
        return ""
    return f", {config.sequence_layout}, by {config.sequence_strategy},"


def describe(built: Build, tokenizer: Tokenizer, data: dict[str, Any]) -> dict[str, Any]:
    """The contents of run.json."""
    devices = list(built.mesh.devices.flat)
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "commit": commit(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": [str(device) for device in devices],
        "device_kind": devices[0].device_kind,
        "processes": processes.count(),
        "mesh": dict(built.mesh.shape),
        "layers": [_layer(record) for record in built.layers],
        "unrolled": built.model.config.unroll,
        "parameters": params_lib.count(built.infos),
        "flops_per_token": build_lib.flops_per_token(built),
        "tokens_per_step": built.config.tokens_per_step,
        "run_tokens": built.run_tokens,
        "schedule_phases": built.schedule.phases._asdict(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
        "data": data,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
    }


def _command(argv: Sequence[str]) -> list[str]:
    """The words that start this program again: a file of launch is a command of `espalier`.

    >>> _command(["/a/launch/train.py", "--workdir=runs/a"])
    ['espalier', 'train', '--workdir=runs/a']
    >>> _command(["/a/mine.py"])
    ['mine.py']
    """
    program = Path(argv[0])
    is_ours = program.parent.name == "launch" and program.suffix == ".py"
    return [*(["espalier", program.stem] if is_ours else [program.name]), *argv[1:]]


def _layer(record: LayerRecord) -> dict[str, Any]:
    return record._asdict() | {"sent": record.sent and record.sent._asdict()}


def commit() -> str:
    """The checkout's commit, with "-dirty" if there are changes; "unknown" outside a checkout."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return (head or "unknown") + ("-dirty" if head and changes else "")


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    """What git prints about this checkout; "" outside one. An environment inside another project's
    checkout counts as outside.
    """
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
