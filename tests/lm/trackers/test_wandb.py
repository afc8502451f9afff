"""A run of Weights & Biases is opened, logged to and closed; a resumed run keeps its id."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.trackers.wandb import Wandb
from tests.lm.trackers import stand_in


def test_records_go_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = stand_in.install(monkeypatch, "wandb")
    workdir = tmp_path / "trial"
    workdir.mkdir()
    for first in (0, 2):
        log = Wandb(project="p", mode="offline").open(workdir, {"seed": 1}, first)
        log.write(2, {"tokens": 20, "train/loss": 0.5})
        log.close()
    (options, run), (again, _) = package.runs
    assert options == again, "a resumed run has the same id"
    assert len(options.pop("id")) == 32
    assert options == {
        "project": "p",
        "entity": None,
        "mode": "offline",
        "name": "trial",
        "dir": str(workdir),
        "config": {"seed": 1},
        "resume": "allow",
    }
    assert run.metrics == [("step", {}), ("*", {"step_metric": "step"})]
    assert run.logged == [({"step": 2, "tokens": 20, "train/loss": 0.5}, {})]
    assert run.is_finished


def test_options_are_refused() -> None:
    assert Wandb().problem() is None
    assert "mode='on' is not one of online, offline" in str(Wandb(mode="on").problem())
    assert "project is empty" in str(Wandb(project="").problem())
