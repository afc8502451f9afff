"""Proof of resume: a run killed at random moments ends exactly as one that never was.

    A: one uninterrupted run
    B: the same run, killed (SIGKILL) at random steps and resumed each time; then launched once more

Equal are every array of the final checkpoint, bit for bit, and every record of metrics.jsonl but
for its time/ entries. The last launch of B must change nothing. Each launch is a process of its
own, since that is what dies.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm import metrics
from lm.config import UserError
from lm.run import checkpoint
from lm.run.items import Meta

POLL_SECONDS = 0.02


class Comparison(NamedTuple):
    """`differences`: what is not equal, in words; empty means proven. `kills`: steps recorded when
    each kill fell.
    """

    differences: list[str]
    kills: list[int]
    steps: int


def verify(train_args: Sequence[str], folder: Path, *, kills: int, seed: int) -> Comparison:
    """Runs A and B below `folder` with `python -m launch.train *train_args --workdir=...` and
    compares them.

    Raises:
      UserError: a launch fails by itself, or there is nothing to kill.
    """
    whole, broken = folder / "uninterrupted", folder / "killed"
    if broken.exists():
        raise UserError(f"{broken} holds a run already; choose another folder")
    _launch(train_args, whole)
    last = metrics.read(whole)[-1]["step"]
    if last < 2:
        raise UserError("a run of one step cannot be killed on its way; lengthen run.length")
    random_steps = random.Random(seed)
    moments = sorted(random_steps.randrange(1, last) for _ in range(kills))
    fell = [_launch_and_kill(train_args, broken, moment) for moment in moments]
    _launch(train_args, broken)
    before = _final(broken)
    _launch(train_args, broken)
    differences = _differences(_final(whole), before, "killed and resumed run")
    differences += _differences(before, _final(broken), "second launch of the finished run")
    return Comparison(differences, fell, last)


class Final(NamedTuple):
    meta: Meta
    records: list[dict[str, Any]]


def _final(workdir: Path) -> Final:
    records = {}
    for line in metrics.read(workdir):
        kept = {key: value for key, value in line.items() if not key.startswith("time/")}
        records[line["step"]] = json.dumps(kept, sort_keys=True)
    path = checkpoint.locate(workdir)
    return Final(
        checkpoint.read_meta(path), [json.loads(records[step]) for step in sorted(records)]
    )


def _differences(a: Final, b: Final, name: str) -> list[str]:
    """The digests cover every bit of every array: see checkpoint.digest."""
    found = []
    if a.meta.step != b.meta.step:
        found.append(f"{name}: final step {a.meta.step} != {b.meta.step}")
    arrays = [key for key, value in a.meta.digest.items() if b.meta.digest.get(key) != value]
    if arrays:
        found.append(
            f"{name}: {len(arrays)} of {len(a.meta.digest)} arrays differ, first {arrays[0]}"
        )
    if len(a.records) != len(b.records):
        found.append(f"{name}: {len(a.records)} records != {len(b.records)}")
    for one, other in zip(a.records, b.records, strict=False):
        keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        if keys:
            found.append(f"{name}: the records of step {one['step']} differ in {sorted(keys)[:3]}")
            break
    return found


def _command(train_args: Sequence[str], workdir: Path) -> list[str]:
    return [sys.executable, "-m", "launch.train", *train_args, f"--workdir={workdir}"]


def _launch(train_args: Sequence[str], workdir: Path) -> None:
    done = subprocess.run(
        _command(train_args, workdir), capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"training in {workdir} ended with status {done.returncode}: {tail}")


def _launch_and_kill(train_args: Sequence[str], workdir: Path, moment: int) -> int:
    """Kills a launch as soon as the records reach step `moment`; returns the last step recorded."""
    process = subprocess.Popen(
        _command(train_args, workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and _last_step(workdir) < moment:
            time.sleep(POLL_SECONDS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return _last_step(workdir)


def _last_step(workdir: Path) -> int:
    records = metrics.read(workdir)
    return records[-1]["step"] if records else 0
