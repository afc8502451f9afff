"""Proof of resume: a run killed at random moments ends exactly as one that was not killed.

    A: one uninterrupted run, which prepares its data
    B: the same run, killed (SIGKILL) again and again and resumed each time: while it prepares its
       data, in a step, in an evaluation, while it saves, while it writes its report; then launched
       once more

These must be equal: every array of the final checkpoint, bit for bit; every record of metrics.jsonl
except its time/ entries; and the prepared tokens. The last launch of B must change nothing. Each
launch is a process of its own (lm/studies/doomed.py), or several that train as one. Of several, one
is killed. The others are killed with it or left to notice, which is drawn at random.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm import files, metrics
from lm.config import UserError
from lm.mapping import UNFINISHED
from lm.run import checkpoint
from lm.run.items import Meta

LATE = 0.1  # seconds after a phase in which a kill may still happen
WAIT_SECONDS = 120.0  # for processes that must notice by themselves that another is gone
PATIENCE = 10  # seconds, the value of a flag of espalier train
WITHIN_A_RUN = ("preparation", "training", "evaluation", "save")


class Kill(NamedTuple):
    """`place` is for example "in evaluation", or "after save", which continues in the background.
    `step` is the last one recorded before the kill.
    """

    place: str
    step: int


class Comparison(NamedTuple):
    """`differences` says in words what is not equal; empty means proven."""

    differences: list[str]
    kills: list[Kill]
    steps: int


class Trained(NamedTuple):
    """How a run is launched: flags of espalier train, its folder, and the number of processes."""

    args: Sequence[str]
    folder: Path
    processes: int

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def data(self) -> Path:
        return self.folder / "data"


def verify(
    train_args: Sequence[str], folder: Path, *, kills: int, seed: int, processes: int = 1
) -> Comparison:
    """Runs A and B below `folder` with `espalier train *train_args` and compares them.

    Raises:
      UserError: a launch fails by itself, or there is nothing to kill.
    """
    whole = Trained(train_args, folder / "uninterrupted", processes)
    broken = Trained(train_args, folder / "killed", processes)
    if broken.folder.exists():
        raise UserError(f"{broken.folder} holds a run already; choose another folder")
    seconds = json.loads(_launch(whole).splitlines()[-1])
    last = metrics.read(whole.workdir)[-1]["step"]
    if last < 2:
        raise UserError("a run of one step cannot be killed midway; lengthen run.length")
    fell = _kill(broken, kills, seconds, random.Random(seed))
    _launch(broken)
    before = _final(broken.workdir)
    _launch(broken)
    differences = _differences(_final(whole.workdir), before, "killed and resumed run")
    differences += _differences(before, _final(broken.workdir), "second launch of the finished run")
    return Comparison(differences, fell, last)


def by_place(kills: Sequence[Kill]) -> dict[str, int]:
    """How many kills fell in each place."""
    return dict(Counter(kill.place for kill in kills).most_common())


def _kill(run: Trained, kills: int, seconds: dict[str, float], rng: random.Random) -> list[Kill]:
    """Kills this many launches. Kills while the report is written come last, because the run has
    then ended. The others are spread evenly over the phases, as far as the run is long enough.
    """
    late = kills // (len(WITHIN_A_RUN) + 1)
    phases = [WITHIN_A_RUN[i % len(WITHIN_A_RUN)] for i in range(kills - late)]
    rng.shuffle(phases)
    phases += ["report"] * late
    fell: list[Kill] = []
    while len(fell) < kills:
        phase = phases[len(fell)]
        if phase == "preparation":
            shutil.rmtree(run.data, ignore_errors=True)
        count = rng.randrange(1, 10) if phase == "training" else 1
        moment = rng.random() * (seconds.get(phase, 0.0) + LATE)
        place = _launch_and_kill(run, (phase, count, moment), rng)
        if place is not None:
            fell.append(Kill(place, _last_step(run.workdir)))
        elif phase in ("training", "evaluation", "save"):  # the run is already at its end
            phases[len(fell)] = rng.choice(("preparation", "report"))
    return fell


class Final(NamedTuple):
    meta: Meta
    records: list[dict[str, Any]]
    tokens: dict[str, str]


def _final(workdir: Path) -> Final:
    records = []
    for line in metrics.read(workdir):
        kept = {key: value for key, value in line.items() if not key.startswith("time/")}
        records.append(json.loads(json.dumps(kept, sort_keys=True)))
    path = checkpoint.locate(workdir)
    loader = checkpoint.read_loader(path)
    return Final(checkpoint.read_meta(path), records, loader["identity"].get("sources", {}))


def _differences(a: Final, b: Final, name: str) -> list[str]:
    """What differs. The digests cover every bit of every array; see checkpoint.digest."""
    found = []
    if a.meta.step != b.meta.step:
        found.append(f"{name}: final step {a.meta.step} != {b.meta.step}")
    if a.tokens != b.tokens:
        found.append(f"{name}: the prepared tokens {a.tokens} != {b.tokens}")
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


def _start(
    run: Trained, doom: tuple[str, int, float], victim: int = 0
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a launch; `victim` is doomed. None survives an error here."""
    flags = [*run.args, f"--workdir={run.workdir}", f"--data_dir={run.data}"]
    if run.processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        flags += [f"--coordinator=localhost:{port}", f"--num_processes={run.processes}"]
        flags += [f"--patience={PATIENCE}"]
    started = []
    for i in range(run.processes):
        own = [f"--process_id={i}"] if run.processes > 1 else []
        words = map(str, doom if i == victim else ("none", 0, 0))
        command = [sys.executable, "-m", "lm.studies.doomed", *words, *flags, *own]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
    return started


def _launch(run: Trained) -> str:
    """Launches without a kill; returns what the first process printed."""
    started = _start(run, ("measure", 0, 0.0))
    outputs = [process.communicate() for process in started]
    for process, (_, err) in zip(started, outputs, strict=True):
        if process.returncode:
            raise _failed(run, process.returncode, err)
    return outputs[0][0]


def _failed(run: Trained, status: int, err: str) -> UserError:
    tail = files.last_line(err)
    return UserError(f"training in {run.workdir} ended with status {status}: {tail}")


def _launch_and_kill(run: Trained, doom: tuple[str, int, float], rng: random.Random) -> str | None:
    """The place where the victim died; None if it ended before.

    Raises:
      UserError: a process ended in another way.
    """
    is_first_alone = doom[0] in ("preparation", "report")
    victim = 0 if is_first_alone else rng.randrange(run.processes)
    started = _start(run, doom, victim)
    _, err = started[victim].communicate()
    status = started[victim].returncode
    others = [process for i, process in enumerate(started) if i != victim]
    if status == -signal.SIGKILL and rng.random() < 0.5:
        for process in others:
            process.kill()
    for process in others:
        try:
            _, text = process.communicate(timeout=WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise UserError(
                f"a process of {run.workdir} outlived the one that was killed"
            ) from None
        if process.returncode not in (0, UNFINISHED, -signal.SIGKILL):
            status, err = process.returncode, text
    if status not in (0, -signal.SIGKILL):
        raise _failed(run, status, err)
    return err.splitlines()[-1] if status else None


def _last_step(workdir: Path) -> int:
    records = metrics.read(workdir)
    return records[-1]["step"] if records else 0
