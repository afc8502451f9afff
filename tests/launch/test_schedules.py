"""launch.schedules: a picture of schedules, a schedule refined from a log, mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import cli, experiments, members
from lm.config import UserError, to_mapping
from lm.families import SCHEDULES
from lm.report import schedules
from lm.schedules.refined import Refined
from tests.launch.test_cli import WORKDIR, load
from tests.lm import launched, test_report, tiny

LENGTHS = ["--tokens=1e6", "--tokens_per_step=1000"]


def launch(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = launched.environment() | {"PYTHONPATH": str(launched.ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "launch.schedules", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


def test_a_page_shows_every_schedule(tmp_path: Path) -> None:
    names = [f"--schedule={name}" for name in SCHEDULES.names()]
    done = launch(*names, *LENGTHS, "--out=rates.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "written: rates.html\n"), done.stderr
    page = (tmp_path / "rates.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in SCHEDULES.names())
    assert page.count("<svg") == 2, "and one for a phone"


def test_an_experiment_is_written_with_a_refined_schedule(tmp_path: Path) -> None:
    test_report.make(tmp_path / "run")
    done = launch(
        f"--config={launched.ROOT}/experiments/base.py",
        "--config.seed=3",
        "--refine=run",
        "--experiment=again.py",
        "--points=21",
        "--out=rates.svg",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "rates.svg").read_text().startswith("<svg xmlns")
    (tmp_path / "run" / "metrics.jsonl").unlink()  # the experiment no longer needs it
    config = cli.load_config(cli.read_config_file(str(tmp_path / "again.py")))
    assert config.seed == 3
    assert isinstance(config.schedule, Refined)
    assert len(config.schedule.profile) == 21
    assert max(config.schedule.profile) == 1.0
    assert config.schedule.profile[-1] == 0.0


def test_a_written_experiment_has_the_same_configuration(tmp_path: Path) -> None:
    config = tiny.config({"model.pattern": ["softmax", "gla"], "log.samples": ['a"""b', "\\\n"]})
    path = tmp_path / "it.py"
    experiments.write(path, 'A """title"""\\', to_mapping(config))
    assert cli.load_config(cli.read_config_file(str(path))) == config

    changed = load([f"--config={path}", WORKDIR, "--config.model.pattern=softmax"])
    assert changed.model.pattern == "softmax"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schedule=wsd"], "set --tokens and --tokens_per_step, or --config"),
        (LENGTHS, "nothing to draw; set --schedule, --refine or --config"),
        ([*LENGTHS, "--schedule=wsd", "--out=x.png"], "--out=x.png is not a page or figure"),
        ([*LENGTHS, "--schedule=wsd:decay"], "--schedule=wsd:decay: write NAME:OPTION=VALUE"),
        ([*LENGTHS, "--schedule=wds"], "--schedule=wds: unknown schedule 'wds'; did you mean"),
        ([*LENGTHS, "--schedule=wsd:warmup=2e6 tokens"], "take 2200000 tokens, run.length has"),
        ([*LENGTHS, "--refine=none"], "none: no such run folder"),
        ([*LENGTHS, "--experiment=x.py"], "needs --refine=RUN and --config=FILE; set both"),
    ],
    ids=lambda x: " ".join(x)[-40:] if isinstance(x, list) else "",
)
def test_mistakes(argv: list[str], message: str, tmp_path: Path) -> None:
    done = launch(*argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_log_without_norms_is_refused(tmp_path: Path) -> None:
    folder = test_report.make(tmp_path / "run")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop(schedules.NORM, None)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"run: 0 gradient norms, 0 of them finite"):
        schedules.profile(folder, schedules.Refining(0.1, 0.01, 2.0, 11))


def test_a_jump_is_drawn_as_one() -> None:
    rule = schedules.rule({"family": "step", "warmup": "0 steps"}, "x")
    (drawn,) = schedules.create({"step": rule}, 1_000_000, 1000)
    places = np.flatnonzero(np.diff(drawn.rates) < 0)
    assert len(places) == 2
    assert (drawn.tokens[places + 1] - drawn.tokens[places] < 1000).all()


def test_a_member_is_written_in_one_word() -> None:
    text = 'step:at=["80 percent", "90 percent"],factors=[0.3, 0.1],warmup=5 steps'
    assert members.member("schedule", text, SCHEDULES) == {
        "family": "step",
        "at": ("80 percent", "90 percent"),
        "factors": (0.3, 0.1),
        "warmup": "5 steps",
    }
    assert members.member("schedule", "wsd", SCHEDULES) == {"family": "wsd"}
    with pytest.raises(UserError, match="decay is given twice"):
        members.member("schedule", "wsd:decay=1 steps,decay=2 steps", SCHEDULES)
