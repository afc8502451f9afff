"""What every tracker does, and how a configuration names one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm import trackers
from lm.config import UserError, to_mapping
from lm.families import TRACKERS
from lm.trackers.off import Off
from lm.trackers.tensorboard import Tensorboard
from tests.lm import tiny
from tests.lm.trackers import stand_in


@pytest.mark.parametrize("name", TRACKERS.names())
def test_a_tracker_opens_where_its_package_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the configuration and the records, and is closed."""
    made = TRACKERS.create(name, "log.tracker")
    if made.package in ("wandb", "trackio"):
        stand_in.install(monkeypatch, made.package)
    log = trackers.opener(tiny.config({"log.tracker": {"family": name}}), tmp_path)(0)
    log.write(1, {"tokens": 10, "train/loss": 0.5})
    log.close()


def test_a_package_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes before any device is touched. A configuration that names the tracker can
    still be read.
    """
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = tiny.config({"log.tracker": {"family": "wandb"}})
    with pytest.raises(UserError) as caught:
        trackers.opener(config, tmp_path)
    assert str(caught.value) == (
        "log.tracker='wandb' needs the package 'wandb', which is not installed: pip install wandb; "
        "or set log.tracker=off"
    )


def test_a_configuration_without_a_tracker_means_tensorboard() -> None:
    """It means TensorBoard, and is written unchanged."""
    values: Any = to_mapping(tiny.config())
    assert "tracker" not in values["log"]
    assert tiny.config().log.tracker == Tensorboard()
    other = tiny.config({"log.tracker": {"family": "off"}})
    assert other.log.tracker == Off()
    assert to_mapping(other)["log"]["tracker"] == {"family": "off"}
