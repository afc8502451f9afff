"""A run of Trackio is opened, logged to and closed; workdirs of the same name are distinct runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.trackers.trackio import Trackio
from tests.lm.trackers import stand_in


def test_records_go_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = stand_in.install(monkeypatch, "trackio")
    names = []
    for folder in ("a", "b", "a"):
        workdir = tmp_path / folder / "trial"
        workdir.mkdir(parents=True, exist_ok=True)
        log = Trackio(project="p").open(workdir, {"seed": 1}, 0)
        log.write(2, {"tokens": 20, "train/loss": 0.5})
        log.close()
        options, run = package.runs[-1]
        names.append(options.pop("name"))
        assert options == {"project": "p", "config": {"seed": 1}, "resume": "allow"}
        assert run.logged == [({"tokens": 20, "train/loss": 0.5}, {"step": 2})]
        assert run.is_finished
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("trial-") for name in names)
    assert "project is empty" in str(Trackio(project="").problem())
