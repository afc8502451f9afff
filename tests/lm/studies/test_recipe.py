"""Recipes: any two parts of a budget give the third, laws stand side by side, and the written
configuration trains.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from lm import metrics
from lm.config import UserError
from lm.laws.power import Power
from lm.laws.step_law import StepLaw
from lm.studies import recipe
from tests.lm import launched, tiny


def test_any_two_give_the_third() -> None:
    wanted = recipe.Budget(6e18, 1e9, 1e9)
    assert recipe.budget(None, 1e9, 1e9) == wanted
    assert recipe.budget(6e18, None, 1e9) == wanted
    assert recipe.budget(6e18, 1e9, None) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), "none of them is given; set two of --flops"),
        ((1e9, None, None), "--flops is given; set two"),
        ((1e9, 1e3, 1e3), "--flops, --parameters, --tokens is given; set two"),
        ((None, -1.0, 1e3), "--parameters=-1 must be positive"),
        ((None, 1e200, 1e200), "--parameters=1e+200 and --tokens=1e+200 make inf flops"),
        ((1e3, None, 1e9), "--flops=1000 and --tokens=1e+09 make 1.66667e-07 parameters"),
    ],
)
def test_mistakes_of_a_budget(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.budget(*given)
    assert message in str(caught.value)


@pytest.mark.parametrize("parameters", [1e5, 1e6, 2e7])
def test_a_configuration_has_the_size_that_was_asked_for(parameters: float) -> None:
    base = tiny.config({"model.pattern": "softmax"})
    config = recipe.sized(base, parameters)
    assert recipe.body_parameters(config) == pytest.approx(parameters, rel=0.25)
    assert config.model.head_dim == base.model.head_dim
    assert config.model.width % base.model.head_dim == 0


def test_what_is_too_small() -> None:
    base = tiny.config()
    with pytest.raises(UserError, match=r"10 parameters are fewer than one layer of width"):
        recipe.sized(base, 10.0)
    with pytest.raises(UserError, match=r"50 tokens are fewer than 100 steps of one row"):
        recipe.configured(base, recipe.budget(None, 1e5, 50.0))


def test_the_laws_answer_as_they_do_alone() -> None:
    asked = recipe.budget(None, 1e9, 1e11)
    config = tiny.config({"data.batch_size": 1024, "data.context_length": 1024})
    found = {(row.quantity, row.law): row for row in recipe.rows(asked, config)}
    batch = found["batch", "step_law"]
    assert batch.value == pytest.approx(1.1077e6, rel=1e-4)  # printed by the specification
    assert (batch.tag, batch.notes) == ("C", ())
    rate = found["rate, standard", "step_law, of a cosine"]
    assert rate.value == pytest.approx(StepLaw().rate(1e9, 1e11))
    rate = found["rate, muP", "power, of a WSD run"]
    assert rate.value == pytest.approx(Power().rate(1 << 20, 1e11))
    assert any("body_parameters=1e+09 lies outside" in note for note in rate.notes)
    by_name = {spread.quantity: spread for spread in recipe.spreads(list(found.values()))}
    batches = [row.value for row in found.values() if row.quantity == "batch"]
    assert by_name["batch"].times == pytest.approx(max(batches) / min(batches))
    assert min(batches) < by_name["batch"].middle < max(batches)


def test_a_size_that_is_far_off_is_reported() -> None:
    asked = recipe.budget(None, 1e5, 1e6)
    far = tiny.config()
    message = recipe.warnings([], asked, far)
    assert any("100,000" in x or "1e+05 were asked for" in x for x in message)


def test_its_experiment_trains(tmp_path: Path) -> None:
    """The experiment that was written trains for two steps, and its JSON is the same
    configuration.
    """
    base = launched.arguments(**{"data.tokenizer.kind": "bpe", "data.tokenizer.vocab_size": 320})
    budget = ["--parameters=30000", "--flops=1e11"]
    env = os.environ | launched.environment()
    run = lambda *argv: subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, env=env, cwd=launched.ROOT
    )
    out, message = tmp_path / "recipe.py", tmp_path / "recipe.json"
    done = run("launch.recipe", *base, *budget, f"--out={out}", f"--json={message}")
    assert done.returncode == 0, done.stderr
    assert "warning: body_parameters=3e+04 lies outside" in done.stdout
    config = cli.load_config(cli.read_config_file(str(out)))
    assert config.run_tokens == pytest.approx(1e11 / 6 / 30000, rel=0.01)
    assert config.schedule.peak_learning_rate == 0.02
    written = json.loads(message.read_text())["recipe"]
    assert written["config"]["data"]["batch_size"] == config.data.batch_size
    short = ["run.length=2 steps", "schedule.warmup=1 steps", "schedule.decay=0 steps"]
    flags = [f"--config.{flag}" for flag in short]
    done = run("launch.train", f"--config={out}", f"--workdir={tmp_path}/run", *flags)
    assert done.returncode == 0, done.stderr
    assert metrics.read(tmp_path / "run")[-1]["step"] == 2
    done = run("launch.recipe", "--tokens=1e9")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--tokens is given; set two of" in done.stderr
