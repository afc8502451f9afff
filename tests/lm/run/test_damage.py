"""Every file of a run folder and of its newest checkpoint is damaged in every way, one at a time. A
run that resumes there refuses in one line, or ends bit for bit like a run that was not damaged. The
slow tier takes all damages and prints a table (pytest -s).
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch import cli
from lm import metrics, report
from lm.config import UserError
from lm.report import figures
from lm.run import checkpoint, failures
from lm.run.checkpoint import DamagedError
from lm.run.digest import digest
from lm.run.record import WRITTEN
from tests.lm.lab import DECAY_START, Lab, copy, files, meta, records

NEWEST = Path(checkpoint.FOLDER) / str(DECAY_START)
NOT_A_COPY = "tensorboard/", ".lock"  # a run never reads them


def flip(file: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size)])


def empty(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def delete(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def folder(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def another_run(file: Path, other: Path, rng: random.Random) -> None:
    shutil.copyfile(other, file)


DAMAGES: tuple[Callable[[Path, Path, random.Random], None], ...] = (
    *(flip, flip, truncate, empty, delete, folder, another_run),
)


class Row(NamedTuple):
    """`verdict` is "refused" (an error of one line), "message" (the run warns and goes on), "same"
    (the file is not read, or is written again) or "WRONG".
    """

    file: str
    damage: str
    verdict: str
    message: str


def names(workdir: Path) -> list[str]:
    """The files of the run and of its newest checkpoint. Array files, which have random names, are
    in the order of their sizes.
    """
    found = [path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size]
    own = [p for p in found if checkpoint.FOLDER not in p.relative_to(workdir).parts]
    kept = [p for p in found if (workdir / NEWEST) in p.parents]
    order = lambda p: (p.parent, p.stat().st_size if p.parent.name == "d" else 0, p.name)
    return [
        str(p.relative_to(workdir)) for p in (*sorted(own, key=order), *sorted(kept, key=order))
    ]


def theirs(other: Path, name: str) -> Path:
    """The same file of another run; for a random name, the largest file of that folder."""
    beside = [path for path in (other / name).parent.iterdir() if path.is_file()]
    return max(beside, key=lambda path: (path.name == Path(name).name, path.stat().st_size))


@pytest.fixture(scope="module")
def other(lab: Lab) -> Path:
    """A run of the same length with another seed and a report."""
    lab.run(lab.root / "other", {"seed": 5}, is_page_written=True)
    return copy(lab.root / "other", lab.root / "other at 9", last=DECAY_START)


@pytest.fixture(scope="module")
def begun(lab: Lab) -> Path:
    """A run with three steps left and a report."""
    lab.run(lab.root / "reported", is_page_written=True)
    return copy(lab.root / "reported", lab.root / "begun", last=DECAY_START)


def facts(workdir: Path) -> dict[str, Any]:
    """Everything that a finished run records, except times and commands."""
    about = json.loads((workdir / "run.json").read_text())
    texts = {name: (workdir / name).read_text() for name in WRITTEN if name != "run.json"}
    steps = checkpoint.steps(workdir)
    for name in ("started", "command", "sha256"):
        del about[name]
    return texts | {"run": about, "records": records(workdir), "meta": meta(workdir), "at": steps}


def resumed(lab: Lab, workdir: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """Resumes the run as a command line does; returns the verdict and the warnings."""
    caplog.clear()
    try:
        with cli.mistakes_in_one_line():
            assert lab.run(workdir).finished
    except SystemExit as end:
        return ("refused" if end.code == 2 else "WRONG"), ""
    message = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return ("message" if message else "same"), "; ".join(message)


def matrix(
    lab: Lab, begun: Path, other: Path, folder: Path, caplog: pytest.LogCaptureFixture, share: int
) -> Iterator[Row]:
    """Applies every `share`-th damage to a copy of the run and resumes it, one damage at a time."""
    whole, workdir = facts(lab.whole), copy(begun, folder / "run")
    cases = itertools.product(names(begun), range(len(DAMAGES)))
    for number, (name, place) in itertools.islice(enumerate(cases), 0, None, share):
        DAMAGES[place](workdir / name, theirs(other, name), random.Random(number))
        verdict, message = resumed(lab, workdir, caplog)
        is_right = verdict == "refused" or facts(workdir) == whole
        yield Row(name, DAMAGES[place].__name__, verdict if is_right else "WRONG", message)
        shutil.rmtree(workdir)
        copy(begun, workdir)


@pytest.mark.parametrize("share", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_no_damage_is_accepted_silently(
    lab: Lab,
    begun: Path,
    other: Path,
    tmp_path: Path,
    share: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.01)
    rows = []
    for row in matrix(lab, begun, other, tmp_path, caplog, share):
        shown = capsys.readouterr().err
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in shown
        assert len(errors) == (row.verdict == "refused"), row
        rows.append(row._replace(message=row.message or "".join(errors)))
    for row in rows:
        print(f"{row.verdict:8} {row.damage:12} {row.file:60} {row.message[:150]}")
    print(f"{len(rows)} damages: {dict(Counter(row.verdict for row in rows))}")
    assert not [row for row in rows if row.verdict == "WRONG"]
    assert {"refused", "message", "same"} == {row.verdict for row in rows}


@pytest.mark.parametrize("share", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_no_damage_to_a_checkpoint_is_loaded(
    lab: Lab, begun: Path, other: Path, tmp_path: Path, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that names the checkpoint gets its state, position and configuration, or an error
    that names a whole checkpoint.
    """
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.01)
    workdir = copy(begun, tmp_path / "run")
    path, abstract = workdir / NEWEST, next(iter(lab.builds.values())).abstract_state
    before = checkpoint.restore(path, abstract)
    wanted, kept = digest(before.state), files(path)
    whole = f"{workdir / checkpoint.FOLDER / '6'} is whole: name that"
    inside = [name for name in names(begun) if Path(name).is_relative_to(NEWEST)]
    refused = 0
    cases = itertools.product(inside, range(len(DAMAGES)))
    for number, (name, place) in itertools.islice(enumerate(cases), 0, None, share):
        DAMAGES[place](workdir / name, theirs(other, name), random.Random(number))
        try:
            found = checkpoint.restore(path, abstract)
        except DamagedError as error:
            is_right, refused = str(error).endswith(whole), refused + 1
        else:
            is_right = digest(found.state) == wanted and found[1:] == before[1:]
        assert is_right, (name, DAMAGES[place])
        shutil.rmtree(path)
        for relative, data in kept.items():
            (path / relative).parent.mkdir(parents=True, exist_ok=True)
            (path / relative).write_bytes(data)
    assert refused >= 40 // share


def test_lost_records_can_be_given_up(lab: Lab, begun: Path, tmp_path: Path) -> None:
    """The run ends with the same weights. run.json, and with it the report, says what is
    missing.
    """
    assert '"accept_lost_records"' in (Path(cli.__file__).parent / "train.py").read_text()
    workdir = copy(begun, tmp_path / "run")
    (workdir / metrics.FILE).unlink()
    with pytest.raises(UserError, match="give up the records that are lost: train with --accept_"):
        lab.run(workdir)
    for _ in range(2):  # the second launch reads what the first has written
        assert lab.run(workdir, accept_lost_records=True).finished
        assert records(workdir) == records(lab.whole)[DECAY_START:]
        about = json.loads((workdir / "run.json").read_text())
        assert about["records_lost_until_step"] == DECAY_START
    assert meta(workdir) == meta(lab.whole)
    assert lab.run(workdir).finished


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl", "samples.jsonl"])
def test_a_report_of_damaged_files_is_refused(
    lab: Lab, begun: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any flipped bit and any cut is refused in one line, or does not change the page."""
    monkeypatch.setattr(figures, "draw", lambda runs: [])  # drawing takes a second
    workdir = copy(lab.root / "reported", tmp_path / "run")  # the run has a report
    sample = {"step": 9, "kind": "greedy", "prompt": "a", "text": "b"}
    (workdir / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    file, page = workdir / name, tmp_path / "page.html"
    data, whole = file.read_bytes(), report.write([workdir], page).read_text()
    for seed in range(60):
        (flip, truncate)[seed % 3 == 0](file, file, random.Random(seed))
        try:
            shown = report.write([workdir], page).read_text()
        except UserError as error:
            is_right = "\n" not in str(error)
        else:
            is_right = shown == whole or name == "samples.jsonl"  # samples have no digest
        assert is_right, seed
        file.write_bytes(data)
