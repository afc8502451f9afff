"""Training on rows that are generated, until a task is solved."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lm.config import UserError
from lm.data.mqar import Epochs, Set, Setting
from tests.lm.lab import Lab, assert_equal_runs, records

# One pair, whose value is the answer. One layer of attention learns that at once.
ONE = Setting(length=8, pairs=1, power=1.0)
ROWS = Epochs(sets=(Set(setting=ONE, examples=512),), vocab_size=257, batch_size=64, seed=0)
TASK = {"task": "mqar", "length": 8, "pairs": 1, "power": 1.0, "rows": 64}
CHANGES: dict[str, Any] = {
    "model.num_layers": 1,
    "data.sources": {},
    "data.context_length": 8,
    "data.batch_size": 64,
    "mup.parametrization": "standard",
    "mup.embedding_multiplier": 1.0,
    "mup.residual_multiplier": 1.0,
    "mup.init_std": 0.1,
    "schedule.decay": "0 steps",
    "run.length": "400 steps",
    "evaluate.tasks": {"one": TASK},
    "evaluate.every": "20 steps",
    "checkpoint.every": "30 steps",
}
SOLVED = {"one": 0.9}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def stop(call: int, args: Any) -> None:
    if call == 24:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_ends_when_its_task_is_solved(lab: Lab, tmp_path: Path) -> None:
    """It ends at the same step if it was interrupted, and does not train again when called again.
    The goal is recorded in run.json.
    """
    options: dict[str, Any] = {"rows": ROWS, "until": SOLVED}
    found = lab.run(tmp_path / "a", CHANGES, **options)
    assert found.finished
    assert 20 < found.step < 400
    accuracy = [x["task/one/accuracy"] for x in records(tmp_path / "a") if x["step"] % 20 == 0]
    assert accuracy[-1] >= 0.9 > max(accuracy[:-1])
    assert json.loads((tmp_path / "a" / "run.json").read_text())["until"] == SOLVED

    stopped = lab.run(tmp_path / "b", CHANGES, **options, step=stop)  # no evaluation, no save
    assert (stopped.step, stopped.finished) == (25, False)
    again = lab.run(tmp_path / "b", CHANGES, **options)
    assert (again.step, again.finished) == (found.step, True)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")

    refuse = lambda call, args: pytest.fail("trained again")
    over = lab.run(tmp_path / "b", CHANGES, **options, step=refuse)
    assert (over.step, over.finished) == (found.step, True)
    more = lab.run(tmp_path / "b", CHANGES, rows=ROWS, step=stop)
    assert (more.step, more.finished) == (found.step + 25, False), "without the goal it goes on"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "data.sources is empty"),
        ({"data.tokenizer.kind": "bpe"}, {"rows": ROWS}, "kind='bpe' is trained on data.sources"),
        ({}, {"rows": ROWS, "until": {"on": 1.0}}, "until 'on' is good: .* did you mean 'one'"),
        ({"data.sources": None}, {"rows": ROWS}, "data.sources names 'text' and this run trains"),
    ],
)
def test_mistakes_in_one_line(
    lab: Lab, tmp_path: Path, changes: dict[str, Any], options: Any, message: str
) -> None:
    changes = CHANGES | changes
    if changes["data.sources"] is None:
        del changes["data.sources"]
    with pytest.raises(UserError, match=message) as caught:
        lab.run(tmp_path / "run", changes, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_rows_are_another_stream(lab: Lab, tmp_path: Path) -> None:
    short = CHANGES | {"run.length": "1 steps"}
    lab.run(tmp_path / "run", short, rows=ROWS)
    other = Epochs(sets=ROWS.sets, vocab_size=257, batch_size=64, seed=1)
    with pytest.raises(UserError, match=r"mqar\.seed was 0, is 1"):
        lab.run(tmp_path / "run", CHANGES, rows=other)
