"""Losses of schedules are predicted before training: a law planted in run folders is recovered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.laws.annealing import Annealing
from lm.report import schedules
from lm.run import formats
from lm.studies import predict_loss
from tests.lm import launched, tiny

KEY = "eval/text/loss"
STEPS = 1000
LAW = Annealing(L0=2.0, A=0.5, alpha=0.4, C=3.0, decay=0.98)


def make(folder: Path, rule: dict[str, Any], noise: float = 0.0, **changes: Any) -> Path:
    """A run folder whose losses are those of LAW."""
    made = {"peak_learning_rate": 0.01, "warmup": "50 steps"} | rule
    config = tiny.config({"schedule": made, "run.length": f"{STEPS} steps"} | changes)
    losses = LAW.curve(predict_loss.rates(config.schedule, config))
    random = np.random.default_rng(len(folder.name))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(formats.write(config)))
    lines = [
        {
            "step": s,
            "tokens": s * config.tokens_per_step,
            KEY: losses[s - 1] + noise * random.normal(),
        }
        for s in range(60, STEPS + 1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_schedule_is_predicted_from_two_others(noise: float, tmp_path: Path) -> None:
    folders = [make(tmp_path / x, {"family": x}, noise) for x in ("constant", "cosine")]
    runs = [predict_loss.read(folder, KEY) for folder in folders]
    found = predict_loss.fit(runs, LAW.decay, 50)
    wanted = predict_loss.read(make(tmp_path / "wsd", {"family": "wsd"}), KEY)
    row = predict_loss.scored(found, wanted)
    assert row.measured is not None
    assert row.measured == pytest.approx(LAW.curve(wanted.curve.rates)[-1])
    assert row.loss == pytest.approx(row.measured, abs=1e-4 if not noise else 0.01)
    assert row.low <= row.measured <= row.high or not noise
    assert predict_loss.residual(found, runs) == pytest.approx(0.67 * noise, abs=0.3 * noise + 1e-5)


def test_schedules_are_ranked_as_the_law_ranks_them(tmp_path: Path) -> None:
    folders = [make(tmp_path / x, {"family": x}) for x in ("constant", "cosine")]
    runs = [predict_loss.read(folder, KEY) for folder in folders]
    found = predict_loss.fit(runs, LAW.decay, 0)
    asked = [{"family": "linear"}, {"family": "wsd", "decay": "5 percent"}, {"family": "rex"}]
    rules = [schedules.like(runs[0].config, values, "x") for values in asked]
    assert all(rule.peak_learning_rate == 0.01 for rule in rules)
    curves = [predict_loss.rates(rule, runs[0].config) for rule in rules]
    rows = [predict_loss.predicted(found, "", curve) for curve in curves]
    wanted = [LAW.curve(curve)[-1] for curve in curves]
    assert np.argsort([row.loss for row in rows]).tolist() == np.argsort(wanted).tolist()


def test_the_command(tmp_path: Path) -> None:
    for name in ("constant", "cosine", "wsd"):
        make(tmp_path / name, {"family": name}, 0.002)
    env = launched.environment() | {"PYTHONPATH": str(launched.ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "launch.predict_loss", "constant", "cosine", f"--key={KEY}"]
    asked = ["--schedule=linear", "--held_out=wsd", "--json=it.json", "--svg=it.svg"]
    done = subprocess.run(
        [*command, *asked], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "it.json").read_text())["predicted"]
    assert found["law"]["decay"] == 1 - 20 / STEPS
    losses = {row["schedule"]: row["loss"] for row in found["schedules"]}
    assert losses.keys() == {"linear", "wsd"}
    assert [*losses.values()] == sorted(losses.values())
    measured = [row["measured"] for row in found["schedules"] if row["schedule"] == "wsd"]
    assert losses["wsd"] == pytest.approx(measured[0], abs=0.02)
    assert f"| wsd | 1,000 | {losses['wsd']:.4f} |" in done.stdout
    assert (tmp_path / "it.svg").read_text().startswith("<svg xmlns")
    assert "wsd, predicted" in (tmp_path / "predicted.html").read_text()
    for argv, message in (
        (["--schedule=wsd:decay=200 percent"], "--schedule=wsd:decay=200 percent: schedule.warmup"),
        (["--schedule=wds"], "--schedule=wds: unknown schedule 'wds'"),
        ([], "name runs and schedules"),
        (["--schedule=wsd", "--key=eval/txt/loss"], "has logged no 'eval/txt/loss'; did you mean"),
        (["--schedule=wsd", "--momentum=1"], "--momentum=1"),
    ):
        flags = [word for word in command if not (argv[1:] and word.startswith("--key"))]
        done = subprocess.run(
            [*flags, *argv] if message != "--momentum=1" else [*command, *argv],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_runs_of_two_batches_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {"family": "constant"})
    two = make(tmp_path / "two", {"family": "cosine"}, **{"data.batch_size": 8})
    with pytest.raises(UserError, match=r"one has data\.batch_size=4, two 8; the law is of one"):
        predict_loss.fit([predict_loss.read(x, KEY) for x in (one, two)], 0.98, 0)


def test_a_run_without_a_configuration_or_with_few_steps(tmp_path: Path) -> None:
    folder = make(tmp_path / "one", {"family": "constant"})
    run = predict_loss.read(folder, KEY)
    short = run._replace(curve=run.curve._replace(rates=run.curve.rates[:20]))
    with pytest.raises(UserError, match=r"the longest run has 20 steps.*set --momentum=0\.5"):
        predict_loss.momentum([short])
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        predict_loss.read(folder, KEY)
