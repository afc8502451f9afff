"""Flags about a member of a family: its own options and defaults, in any order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launch import overrides
from lm.families import OPTIMIZERS, SCHEDULES
from lm.mapping import Duration, UserError
from tests.launch.test_cli import CONFIG, ROOT, WORKDIR, line_of, load

FAMILY = "--config.schedule.family=wsd"


@pytest.mark.parametrize("is_first", [True, False])
def test_a_family_takes_its_own_options_whatever_the_order(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quickstart.py sets a warmup of 50,000 tokens for Power; it goes with that."""
    monkeypatch.chdir(ROOT)
    flags = ["--config.schedule.decay=10 percent", "--config.schedule.peak_learning_rate=0.01"]
    flags = [FAMILY, *flags] if is_first else [*flags, FAMILY]
    config = load(["--config=quickstart", WORKDIR, *flags])
    wsd = SCHEDULES.create("wsd", "schedule")
    asked = {"decay": Duration(10, "percent"), "peak_learning_rate": 0.01}
    assert config.schedule == dataclasses.replace(wsd, **asked)


def test_options_of_a_family_that_was_dropped_are_unknown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = line_of([CONFIG, WORKDIR, "--config.schedule.a=3.0", FAMILY], capsys)
    told = "unknown key --config.schedule.a; it is an option of power, and schedule.family is wsd"
    assert told in line


def test_a_member_is_named_by_itself_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(
        [CONFIG, WORKDIR, "--config.schedule.horizon=90 percent", "--config.schedule=cosine"]
    )
    assert config.schedule == SCHEDULES.create(
        {"family": "cosine", "horizon": "90 percent"}, "schedule"
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--config.schedule=wsd-x"], "unknown schedule 'wsd-x'; did you mean 'wsd'?"),
        (["--config.schedule="], "unknown schedule ''; known: constant, cosine, infinite"),
        (["--config.model.mlp.ffn_dim=64"], "it is the model's unless model.mlp is set whole"),
        (["--config.model.mlp=none"], "unknown feed-forward 'none'; known: swiglu"),
    ],
    ids=str,
)
def test_mistakes_about_members(
    flags: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert told in line_of([CONFIG, WORKDIR, *flags], capsys)


def test_a_member_is_named_after_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load([CONFIG, WORKDIR, "--config.schedule", "wsd", "--config.seed=3"])
    assert config.schedule == SCHEDULES.create("wsd", "schedule")
    assert config.seed == 3


def test_an_option_that_the_file_leaves_out_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "short.py"
    file.write_text(
        "from experiments import base\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.optimizer = {'family': 'adamw'}\n"
        "    config.model.layers = {'a': {'mixer': 'softmax', 'mlp': {'family': 'swiglu'}}}\n"
        "    return config\n"
    )
    config = load([f"--config={file}", WORKDIR, "--config.optimizer.beta1", "0.8"])
    assert config.optimizer == OPTIMIZERS.create({"family": "adamw", "beta1": 0.8}, "optimizer")


def test_axes_of_a_grid() -> None:
    asked = ["seed=0,1", 'model.pattern=["a","a,b"]', "run.length=1e6 tokens,2e6 tokens", "x=1e-3"]
    assert overrides.axes("grid", asked) == {
        "seed": (0, 1),
        "model.pattern": ("a", "a,b"),
        "run.length": ("1e6 tokens", "2e6 tokens"),
        "x": (0.001,),
    }
    for text in ("seed", "seed=", "=1"):
        with pytest.raises(UserError, match="write KEY=VALUE,VALUE"):
            overrides.axes("grid", [text])
    with pytest.raises(UserError, match="seed is given twice"):
        overrides.axes("grid", ["seed=0", "seed=1"])
