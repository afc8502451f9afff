"""Flags on a member of a family: it has its own options and defaults, in any order of flags."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from absl import flags as flag_module

from launch import cli, overrides
from lm.families import OPTIMIZERS, SCHEDULES
from lm.mapping import Duration, UserError, to_mapping
from tests.launch.test_cli import CONFIG, ROOT, WORKDIR, line_of, load

FAMILY = "--config.schedule.family=wsd"


@pytest.mark.parametrize("is_first", [True, False])
def test_a_family_takes_its_own_options_in_any_order(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quickstart.py sets a warmup of 50,000 tokens for Power, which is dropped with Power."""
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
    message = (
        "unknown key --config.schedule.a; it is an option of power, and schedule.family is wsd"
    )
    assert message in line


def test_a_family_key_takes_the_name_of_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(
        [CONFIG, WORKDIR, "--config.schedule.horizon=90 percent", "--config.schedule=cosine"]
    )
    assert config.schedule == SCHEDULES.create(
        {"family": "cosine", "horizon": "90 percent"}, "schedule"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.schedule=wsd-x"], "unknown schedule 'wsd-x'; did you mean 'wsd'?"),
        (["--config.schedule="], "unknown schedule ''; known: "),
        (["--config.model.mlp=none"], "unknown feed-forward 'none'; known: swiglu"),
    ],
    ids=str,
)
def test_mistakes_about_members_are_one_line(
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert message in line_of([CONFIG, WORKDIR, *flags], capsys)


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


def test_what_the_file_leaves_out_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of members, labels, sources and tasks can be set, with flags in any order."""
    monkeypatch.chdir(ROOT)
    flags = [
        "model.pattern=((1,local),(2,'gla,softmax'),(1,[gla]))",
        "model.layers.local.qk_norm=True",
        "model.layers.local.mlp.ffn_dim=64",
        "model.layers.local.mixer=softmax",
        "model.layers.local.mlp=swiglu",
        "model.layers.gla.mlp=none",
        "model.mlp.ffn_dim=96",
        "data.sources.mine.path=~/text/[ab]*.md",
        "evaluate.tasks.mqar.pairs=2",
        "evaluate.tasks.far.task=passkey",
        "log.samples=['def ', 'a, b']",
    ]
    config = load([CONFIG, WORKDIR, *(f"--config.{flag}" for flag in flags)])
    assert to_mapping(config.model)["layers"] == {
        "local": {
            "mixer": "softmax",
            "qk_norm": True,
            "mlp": {"family": "swiglu", "ffn_dim": 64},
        },
        "gla": {"mlp": "none"},
    }
    assert config.model.pattern == ((1, "local"), (2, "gla,softmax"), (1, ("gla",)))
    assert config.model.mlp.options["ffn_dim"] == 96
    assert set(config.data.sources) == {"stdlib", "mine"}
    mine = config.data.sources["mine"]
    assert (mine.path, mine.text_key, mine.weight) == ("~/text/[ab]*.md", "text", 1.0)
    assert to_mapping(config.evaluate.tasks) == {"mqar": {"pairs": 2}, "far": {"task": "passkey"}}
    assert config.log.samples == ("def ", "a, b")


def test_sources_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flags = ["--config.data.sources={}", "--config.data.sources.mine.path=2024"]
    config = load([CONFIG, WORKDIR, *flags])
    assert [source.path for source in config.data.sources.values()] == ["2024"]


def test_a_new_mixer_of_a_label_drops_mixer_options_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "from experiments import base\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.model.layers = {'a': {'mixer': 'softmax', 'window': 8, 'mlp': 'none'}}\n"
        "    return config\n"
    )
    config = load([f"--config={file}", WORKDIR, "--config.model.layers.a.mixer=gla"])
    assert to_mapping(config.model)["layers"] == {"a": {"mixer": "gla", "mlp": "none"}}


def study(overrides: list[str]) -> dict[str, Any]:
    """The values that launch.compare gets."""
    flags = flag_module.FlagValues()
    config = cli.config_flag(flags, study="lm.studies.study:Study")
    preset = "--config=experiments/compare/config.py:smoke"
    cli.parse(["compare", preset, *(f"--config.{x}" for x in overrides)], flags)
    return config.value.to_dict()


def test_keys_of_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = ["seeds=3,4", "run.schedule=wsd", "run.model.layers.a=gla", "tasks.mqar.pairs=2"]
    asked += ["patterns=[gla, 'gla,softmax']", "run.data.sources.mine.path=a.txt"]
    found = study(asked)
    assert (found["seeds"], found["patterns"]) == ((3, 4), ("gla", "gla,softmax"))
    assert found["run"]["schedule"] == {"family": "wsd"}
    assert found["run"]["model"]["layers"]["a"] == {"mixer": "gla"}
    assert found["run"]["data"]["sources"]["mine"]["valid_fraction"] == 0.05
    assert found["tasks"]["mqar"]["pairs"] == 2
    for text, message in (("seed=1", "'seeds'"), ("run.model.widht=1", "'width'")):
        with pytest.raises(UserError, match=f"did you mean {message}"):
            study([text])


def test_axes_of_a_grid() -> None:
    asked = ["seed=0,1", 'model.pattern=["a","a,b"]', "run.length=1e6 tokens,2e6 tokens", "x=1e-3"]
    asked += ["model.unroll=True,false", "y=((1,a),(2,b)),c", "z=[((1,a),(2,b))]"]
    assert overrides.axes("grid", asked) == {
        "seed": (0, 1),
        "model.pattern": ("a", "a,b"),
        "run.length": ("1e6 tokens", "2e6 tokens"),
        "x": (0.001,),
        "model.unroll": (True, False),
        "y": (((1, "a"), (2, "b")), "c"),
        "z": (((1, "a"), (2, "b")),),
    }
    for text in ("seed", "seed=", "=1"):
        with pytest.raises(UserError, match="write KEY=VALUE,VALUE"):
            overrides.axes("grid", [text])
    with pytest.raises(UserError, match="--grid=seed is given twice"):
        overrides.axes("grid", ["seed=0", "seed=1"])
