"""The proof of resume at a small size, and that it finds runs that differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lm import metrics
from lm.config import UserError
from lm.run import checkpoint
from lm.studies import resume
from tests.lm import launched
from tests.lm.lab import DECAY_START, Lab, copy


@pytest.mark.parametrize(
    ("kills", "processes"),
    [
        (1, 1),
        pytest.param(5, 1, marks=pytest.mark.slow),
        pytest.param(5, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(
    kills: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kills are spread over the phases of a run."""
    for name, value in launched.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(launched.ROOT)
    length = launched.STEPS * kills
    arguments = launched.arguments(**{"run.length": f"{length} steps"})
    found = resume.verify(arguments, tmp_path, kills=kills, seed=kills, processes=processes)
    assert found.differences == []
    assert (len(found.kills), found.steps) == (kills, length)
    phases = {kill.place.partition(" ")[2] for kill in found.kills}
    assert len(phases) >= min(kills, 4)
    assert all(kill.step < length or "report" in kill.place for kill in found.kills)


def differences(a: Path, b: Path) -> list[str]:
    return resume._differences(resume._final(a), resume._final(b), "it")


def test_differences_are_found(lab: Lab, tmp_path: Path) -> None:
    assert differences(lab.whole, lab.whole) == []
    found = differences(lab.whole, copy(lab.whole, tmp_path / "a", last=DECAY_START))
    assert found[0] == "it: final step 12 != 9"
    assert " arrays differ, first " in found[1]
    workdir = copy(lab.whole, tmp_path / "b")
    path = workdir / metrics.FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines).replace('"train/loss": ', '"train/loss": 1', 1))
    assert differences(lab.whole, workdir) == ["it: the records of step 1 differ in ['train/loss']"]
    path.write_text("".join(lines[1:]))
    assert "it: 12 records != 11" in differences(lab.whole, workdir)
    assert checkpoint.steps(workdir) == checkpoint.steps(lab.whole)
    path.write_text("".join(lines).replace('"time/', '"time/other_'))
    assert differences(lab.whole, workdir) == []


def test_a_folder_that_was_used_proves_nothing(lab: Lab, tmp_path: Path) -> None:
    shutil.copytree(lab.whole, tmp_path / "killed")
    with pytest.raises(UserError, match="holds a run already"):
        resume.verify([], tmp_path, kills=1, seed=0)


def test_a_launch_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(launched.ROOT)
    with pytest.raises(UserError, match=r"ended with status 2: error: missing flag --config"):
        resume.verify([], tmp_path, kills=1, seed=0)
