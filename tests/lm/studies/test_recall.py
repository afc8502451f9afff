"""The study of recall: what it trains (each training once), and what it shows."""

from __future__ import annotations

import dataclasses
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import pytest

from experiments import base
from experiments.recall.config import get_config
from lm import build as build_lib
from lm import evals, metrics, report
from lm.build import Build
from lm.config import UserError
from lm.data import tokenizers
from lm.evals import Given
from lm.parallel import mesh
from lm.report import recall as recall_page
from lm.report.figures import standalone
from lm.report.recall import Row
from lm.run import record
from lm.studies import grid, measure, recall
from lm.studies.recall import Outcome, Point
from tests.lm import launched


def values(**changes: Any) -> dict[str, Any]:
    """The smoke preset. Changes apply to the study, or to its only problem."""
    mapping = get_config("smoke").to_dict()
    problem = mapping["problems"]["16"]
    for key, value in changes.items():
        (problem if key in problem else mapping)[key] = value
    return mapping


def pretend(monkeypatch: pytest.MonkeyPatch, accuracy: dict[tuple[str, float], float]) -> list[str]:
    """Replaces training. Returns the names of the trainings that are asked for."""
    asked: list[str] = []

    def train_point(study: recall.Study, point: Point, workdir: Path) -> Outcome:
        asked.append(workdir.name)
        right = accuracy.get((point.pattern, point.learning_rate), 0.5)
        return Outcome({"16x2": right, "16x4": right / 2}, 4, 0, 2.0, 100, 1024 * point.width)

    monkeypatch.setattr(recall, "train_point", train_point)
    return asked


def run(study: recall.Study, workdir: Path, table: Sequence[Any] = ()) -> list[Row]:
    found = recall.run(study, recall.create_grid(study, workdir, table))
    assert found is not None
    return recall.rows(study, found)


def test_every_preset_is_a_study() -> None:
    for preset in ("smoke", "cpu", "figure2", "based"):
        recall.create(get_config(preset).to_dict())
    published = recall.create(get_config("figure2").to_dict()).problems
    assert {name: problem.batch_size for name, problem in published.items()} == {
        "64x4": 512,
        "128x8": 512,
        "256x16": 256,
        "512x64": 128,
    }
    for name, problem in published.items():
        assert [rows.setting.name for rows in problem.train + problem.test] == [name, name]
        assert problem.steps == 64 * (100_000 // problem.batch_size)
    mixture = recall.create(get_config("based").to_dict()).problems["mixture"]
    assert sum(rows.examples for rows in mixture.train) == 180_000
    # An epoch has 390 batches of the first set and 78 of each of four others; there are 32 epochs.
    assert mixture.steps == 32 * (390 + 4 * 78)


def test_a_point_is_a_run_of_its_own() -> None:
    study = recall.create(values(widths=(8, 24), seeds=(5,)))
    point = recall.points(study)[-1]
    config = recall.configuration(study, point)
    assert (config.model.width, config.model.head_dim, config.model.pattern) == (
        24,
        24,
        "conv,linear",
    )
    assert config.seed == 5
    assert config.schedule.peak_learning_rate == point.learning_rate == 1e-3
    assert (config.run_steps, config.data.batch_size, config.data.context_length) == (4, 8, 16)


def test_tests_have_other_rows_than_training() -> None:
    study = recall.create(values(test=[values()["problems"]["16"]["train"][0]]))
    point = recall.points(study)[0]
    config = recall.configuration(study, point)
    rows = recall.training_rows(study, config, point)
    trained = {row.tobytes() for step in range(8) for row in rows.batch(step).tokens}
    assert len(trained) == 64
    task = evals.create(config.evaluate.tasks, "tasks")["16x2"]
    given = Given(tokenizers.create(config.data.tokenizer), cast(Any, None), config.data, 0)
    asked = {row.tokens.tobytes() for row in task.items(given).rows}
    assert len(asked) == 64
    assert not trained & asked


def test_state_bytes_are_those_of_the_cache() -> None:
    study = recall.create(values(patterns=("softmax",)))
    built = build_lib.build(recall.configuration(study, recall.points(study)[0]), jax.devices()[:1])
    # Each of two layers has k, v and a segment id per token, and a length. The model has the next
    # position.
    assert measure.state_bytes(built.model, 16) == 2 * (16 * (2 * 8 * 4 + 4) + 4) + 4


def test_a_training_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few real steps on generated rows. The run answers its tests, and would end once they are
    solved.

    tests/lm/test_generated.py tests that such a run learns.
    """
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(mesh, "foreseen", lambda: (1, ("cpu",)))
    monkeypatch.setattr(report, "write", lambda workdirs, out: out)
    mapping = values(patterns=("softmax",), learning_rates=(1e-2,))
    mapping["run"]["model"]["num_layers"] = 1
    study = recall.create(mapping)
    found = recall.run(study, recall.create_grid(study, tmp_path, ()))
    assert found is not None
    (point, outcome), *_ = found.items()
    place = tmp_path / "points" / "16-softmax-8-0.01-0"
    assert record.recorded(place, "until") == {"16x2": 0.99, "16x4": 0.99}
    assert record.recorded(place, "data", "mqar", "batch_size") == 8
    # Parameters of the layer. State: k, v and a segment id per token, a length, the next position.
    sizes = 4 * 8 * 8 + 8 + 8, 16 * (2 * 8 * 4 + 4) + 4 + 4
    last = metrics.read(place)[-1]
    accuracy = {name: last[f"task/{name}/accuracy"] for name in ("16x2", "16x4")}
    assert outcome == Outcome(accuracy, 4, 0, outcome.seconds, *sizes)
    assert recall.rows(study, found)[0].accuracy == accuracy

    (place / "cell.json").unlink()  # as if killed just before it was written
    monkeypatch.setattr(Build, "put", lambda *x: pytest.fail("trained again"))
    again = recall.train_point(study, point, place)
    assert again is not None
    assert dataclasses.replace(again, seconds=outcome.seconds) == outcome


def test_rates_after_a_solved_one_are_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = {("softmax", 1e-2): 1.0, ("conv,linear", 1e-2): 0.2, ("conv,linear", 1e-3): 0.6}
    asked = pretend(monkeypatch, accuracy)
    study = recall.create(values(solved=0.5, seeds=(0, 1)))
    rows = run(study, tmp_path)
    assert asked == [
        "16-softmax-8-0.01-0",
        "16-softmax-8-0.01-1",
        "16-conv+linear-8-0.01-0",
        "16-conv+linear-8-0.01-1",
        "16-conv+linear-8-0.001-0",
        "16-conv+linear-8-0.001-1",
    ]
    assert [(row.pattern, row.learning_rate) for row in rows] == [
        ("softmax", 1e-2),
        ("conv,linear", 1e-3),
    ]
    assert rows[0].accuracy == {"16x2": 1.0, "16x4": 0.5}
    assert rows[1].by_seed == {"16x2": (0.6, 0.6), "16x4": (0.3, 0.3)}
    assert (rows[0].num_trained, rows[0].seconds) == (2, 4.0)
    assert (rows[1].num_trained, rows[1].seconds) == (4, 8.0)
    stricter = recall.create(values(solved=0.5, seeds=(0,)))
    assert run(stricter, tmp_path)[1].num_trained == 2
    assert len(asked) == 6, "fewer seeds are there already"


def test_the_same_command_resumes_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, {})
    study = recall.create(values())
    rows = run(study, tmp_path)
    assert len(asked) == 4
    lost = tmp_path / "points" / "16-conv+linear-8-0.001-0" / "cell.json"
    lost.unlink()
    assert run(study, tmp_path) == rows
    assert asked[4:] == ["16-conv+linear-8-0.001-0"]

    wider = recall.create(values(widths=(8, 16)))
    run(wider, tmp_path)
    assert len(asked) == 9, "a larger grid takes what is there"

    run_values = values()["run"]
    run_values["log"] |= {"every": "2 steps"}
    run_values["mesh"] |= {"data": 1}
    run(recall.create(values(run=run_values)), tmp_path)
    assert len(asked) == 9, "what a resumed run may change does not make another question"
    run_values["mup"] |= {"init_std": 0.2}
    with pytest.raises(UserError, match=r"another config \(run\.mup\.init_std: 0\.1 -> 0\.2\)"):
        run(recall.create(values(run=run_values)), tmp_path)

    other = recall.create(values(steps=5))
    with pytest.raises(UserError, match=r"another config \(problem\.steps: 4 -> 5\)"):
        run(other, tmp_path)
    with pytest.raises(UserError, match=r"another config \(solved: 0\.99 -> 0\.5\)"):
        run(recall.create(values(solved=0.5)), tmp_path)
    lost.write_text("{")
    with pytest.raises(UserError, match=r"linear-8-0\.001-0/cell\.json is damaged"):
        run(study, tmp_path)
    assert len(asked) == 9, "mistakes are reported before anything is trained"


def test_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, {("softmax", 1e-2): 0.9876})
    study = recall.create(values(widths=(8, 16)))
    rows, num_trained = run(study, tmp_path), len(asked)
    trainings = recall.create_grid(study, tmp_path, ())
    cells = grid.entries(trainings, grid.read(trainings))
    recall.write(rows, cells, {"commit": "0"}, tmp_path)
    kept = json.loads((tmp_path / "recall.json").read_text())
    assert kept["commit"] == "0"
    text = (tmp_path / "recall.md").read_text()
    assert text == recall_page.table(rows)
    assert recall_page.rows_of(kept["recall"]) == rows
    assert "| softmax | 16 | 16,384 | 98.8 % | 49.4 % | 0.01 | 4 | 100 | 2 | 4 |" in text
    svg = (tmp_path / "recall.svg").read_text()
    words = [x.text for x in ElementTree.fromstring(svg).iter() if x.tag.endswith("}text")]
    assert {"softmax", "conv,linear", "16: 16x2", "16: 16x4", "state, bytes a row"} <= set(words)
    assert 'href="http' not in svg, "readable offline"
    assert svg == standalone(recall_page.figure(rows)), "the same numbers, the same file"

    table = grid.read_table(tmp_path / "recall.json", Outcome)
    assert run(study, tmp_path / "elsewhere", table) == rows
    assert len(asked) == num_trained == 8, "what is in a table is not trained again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, r"config\.widths is empty"),
        ({"patterns": ("softmax", "softmax")}, r"config\.patterns=.* names one twice"),
        ({"learning_rates": (1e-2, 0.01)}, r"config\.learning_rates=.* names one twice"),
        ({"learning_rates": (1e-2, 1.0000001e-2)}, "two cells would share the folder"),
        ({"solved": 0.0}, r"solved=0\.0 must lie in \(0, 1\]"),
        ({"patterns": ("softmaxx",)}, "did you mean 'softmax'"),
        ({"steps": 0}, r"problems\.16\.steps=0"),
        ({"batch_size": 100}, "examples=64 make no batch of 100"),
        ({"test": ()}, r"problems\.16\.test is empty"),
        ({"learning_rates": (0.0,)}, "peak_learning_rate=0"),
        ({"nothing": 1}, "unknown key config.nothing"),
        ({"problems": {"a/b": get_config("smoke").to_dict()["problems"]["16"]}}, "'a/b' is to be"),
    ],
)
def test_mistakes_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        recall.create(values(**changes))
    assert "\n" not in str(caught.value)


def test_settings_and_heads_that_do_not_fit() -> None:
    mapping = values()
    mapping["problems"]["16"]["test"][0]["setting"]["pairs"] = 5
    with pytest.raises(UserError, match=r"problems\.16: pairs=5 in length=16"):
        recall.create(mapping)
    mapping = values(widths=(9,))
    mapping["run"]["model"] |= {"num_heads": 2, "num_kv_heads": 2}
    with pytest.raises(UserError, match="9 is not a multiple of num_heads=2"):
        recall.create(mapping)
    mapping = values()
    rows = mapping["problems"]["16"]["test"]
    mapping["problems"]["16"]["test"] = (rows[0], rows[0])
    with pytest.raises(UserError, match="test has 16x2 twice"):
        recall.create(mapping)
    mapping = values()
    mapping["run"]["data"]["sources"] = base.get_config().to_dict()["data"]["sources"]
    with pytest.raises(UserError, match=r"config\.run\.data\.sources: the rows are generated"):
        recall.create(mapping)


@pytest.mark.slow
def test_the_command_resumes_and_says_where_it_ran(tmp_path: Path) -> None:
    workdir = tmp_path / "study"
    config = "--config=recall:smoke"
    command = [sys.executable, "-m", "launch.recall", config, f"--workdir={workdir}"]

    def launch(*more: str) -> tuple[int, str, str]:
        process = launched.start([*command, *more])
        out, err = process.communicate()
        return process.returncode, out, err

    status, out, err = launch()
    assert status == 0, err
    kept = json.loads((workdir / "recall.json").read_text())
    assert kept["command"] == f"espalier recall {config} --workdir=DIR"
    assert [row["steps"] for row in kept["recall"]] == [[4], [4]]
    assert recall_page.table(recall_page.rows_of(kept["recall"])) in out
    assert len([line for line in err.splitlines() if line.startswith("[")]) == 4, "one a training"
    status, again, err = launch(f"--table={workdir / 'recall.json'}")
    assert (status, again, err) == (0, out, "")
    status, _, err = launch("--config.solved=0.5")
    assert status == 2
    assert "another config (solved: 0.99 -> 0.5)" in err
