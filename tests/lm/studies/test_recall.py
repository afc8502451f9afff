"""The study of recall: what is trained, once, and what is shown of it."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.recall.config import get_config
from lm import build as build_lib
from lm.config import UserError
from lm.data import mqar
from lm.report import recall as recall_page
from lm.report.figures import standalone
from lm.run import record
from lm.studies import measure, recall
from lm.studies.recall import Outcome, Point
from tests.lm import launched


def values(**changes: Any) -> dict[str, Any]:
    """The smoke preset, with changes of the study or of its one problem."""
    mapping = get_config("smoke").to_dict()
    problem = mapping["problems"]["16"]
    for key, value in changes.items():
        (problem if key in problem else mapping)[key] = value
    return mapping


def pretend(monkeypatch: pytest.MonkeyPatch, accuracy: dict[tuple[str, float], float]) -> list[str]:
    """Stands in for training; returns the names of what was asked for."""
    asked: list[str] = []

    def train(study: recall.Study, point: Point, told: Any) -> Outcome:
        asked.append(point.name)
        told(2, "loss 1.000")
        right = accuracy.get((point.pattern, point.learning_rate), 0.5)
        return Outcome({"16x2": right, "16x4": right / 2}, 4, 0, 2.0, 100, 1024 * point.width)

    monkeypatch.setattr(recall, "train", train)
    return asked


def quiet(point: Point, step: int, note: str) -> None:
    del point, step, note


def test_every_preset_is_a_study() -> None:
    for preset in ("smoke", "cpu", "figure2", "based"):
        study = recall.create(get_config(preset).to_dict())
        assert len({point.name for point in recall.points(study)}) == len(recall.points(study))
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
    # 390 batches of the first set and 78 of each other, 32 times.
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


def test_batches_are_epochs_of_whole_sets() -> None:
    row = values()["problems"]["16"]["train"][0]
    longer = {"setting": row["setting"] | {"length": 32}, "examples": 20}
    study = recall.create(values(train=(row, longer)))
    problem = study.problems["16"]
    found = list(islice(recall.batches(problem, 384, 0), 10 + 10))
    for epoch in (found[:10], found[10:]):
        # 64 rows are eight batches of 8, 20 are two; none twice.
        assert sorted(len(batch.tokens[0]) for batch in epoch) == [16] * 8 + [32] * 2
        rows = {row.tobytes() for batch in epoch for row in batch.tokens}
        assert len(rows) == 80
    lengths = [[len(batch.tokens[0]) for batch in epoch] for epoch in (found[:10], found[10:])]
    assert lengths[0] != lengths[1]
    again = next(recall.batches(problem, 384, 0))
    assert all((a == b).all() for a, b in zip(found[0], again, strict=True))
    tests = recall._tests(problem, 384)
    trained = {row.tobytes() for batch in found for row in batch.tokens}
    assert not trained & {row.tokens.tobytes() for row in tests["16x2"][1].rows}


def test_state_bytes_are_those_of_the_cache() -> None:
    study = recall.create(values(patterns=("softmax",)))
    built = build_lib.build(recall.configuration(study, recall.points(study)[0]), jax.devices()[:1])
    # Two layers of k and v, segment ids and a length; and the model's next position.
    assert measure.state_bytes(built.model, 16) == 2 * (16 * (2 * 8 * 4 + 4) + 4) + 4


def test_a_training_learns_and_stops_when_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair: its value is the answer, which one layer of attention learns at once."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    setting = {"length": 8, "pairs": 1, "repeats": 0, "filler": "blank", "power": 1.0}
    rows = ({"setting": setting, "examples": 512},)
    mapping = values(train=rows, test=rows, batch_size=64, steps=400, evaluate_every=20, solved=0.9)
    mapping |= {"patterns": ("softmax",), "widths": (32,), "learning_rates": (1e-2,)}
    mapping["run"]["data"]["tokenizer"]["vocab_size"] = 257
    mapping["run"]["model"]["num_layers"] = 1
    study = recall.create(mapping)
    notes: list[tuple[int, str]] = []
    outcome = recall.train(study, recall.points(study)[0], lambda *note: notes.append(note))
    assert outcome.accuracy["8x1-p1"] >= 0.9
    assert outcome.steps == notes[-1][0] < 400
    assert outcome.skipped == 0
    assert outcome.parameters == 4 * 32 * 32 + 32 + 32
    assert "accuracy 0." in notes[0][1]


def test_rates_after_a_solved_one_are_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = {("softmax", 1e-2): 1.0, ("conv,linear", 1e-2): 0.2, ("conv,linear", 1e-3): 0.6}
    asked = pretend(monkeypatch, accuracy)
    told: list[tuple[str, int]] = []
    study = recall.create(values(solved=0.5, seeds=(0, 1)))
    rows = recall.run(study, tmp_path, lambda point, step, _: told.append((point.name, step)))
    assert asked == [
        "16_softmax_8_0.01_0",
        "16_softmax_8_0.01_1",
        "16_conv-linear_8_0.01_0",
        "16_conv-linear_8_0.01_1",
        "16_conv-linear_8_0.001_0",
        "16_conv-linear_8_0.001_1",
    ]
    assert [(row.pattern, row.learning_rate) for row in rows] == [
        ("softmax", 1e-2),
        ("conv,linear", 1e-3),
    ]
    assert rows[0].accuracy == {"16x2": 1.0, "16x4": 0.5}
    assert rows[1].by_seed == {"16x2": [0.6, 0.6], "16x4": [0.3, 0.3]}
    assert (rows[0].num_trained, rows[0].seconds) == (2, 4.0)
    assert (rows[1].num_trained, rows[1].seconds) == (4, 8.0)
    # Every point of the grid is accounted for, trained or not.
    assert [name for name, step in told if not step] == [p.name for p in recall.points(study)]


def test_the_same_command_resumes_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, {})
    study = recall.create(values())
    rows = recall.run(study, tmp_path, quiet)
    assert len(asked) == 4
    lost = tmp_path / "points" / "16_conv-linear_8_0.001_0.json"
    lost.unlink()
    assert recall.run(study, tmp_path, quiet) == rows
    assert asked[4:] == ["16_conv-linear_8_0.001_0"]

    wider = recall.create(values(widths=(8, 16)))
    recall.run(wider, tmp_path, quiet)
    assert len(asked) == 9, "a larger grid takes what is there"

    other = recall.create(values(steps=5))
    with pytest.raises(UserError, match=r"another config \(problem\.steps: 4 -> 5\)"):
        recall.run(other, tmp_path, quiet)
    lost.write_text("{")
    with pytest.raises(UserError, match=r"conv-linear_8_0\.001_0\.json is damaged"):
        recall.run(study, tmp_path, quiet)
    assert len(asked) == 9, "mistakes are told before anything is trained"
    with record.locked(tmp_path), pytest.raises(UserError, match="in use"):
        recall.run(study, tmp_path, quiet)


def test_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {("softmax", 1e-2): 0.9876})
    study = recall.create(values(widths=(8, 16)))
    rows = recall.run(study, tmp_path, quiet)
    recall.write(rows, {"commit": "0"}, tmp_path)
    kept = json.loads((tmp_path / "recall.json").read_text())
    assert kept["commit"] == "0"
    text = (tmp_path / "recall.md").read_text()
    assert text == recall_page.table(kept["recall"])
    assert "| softmax | 16 | 16,384 | 98.8 % | 49.4 % | 0.01 | 4 | 100 | 2 | 4 |" in text
    svg = (tmp_path / "recall.svg").read_text()
    words = [x.text for x in ElementTree.fromstring(svg).iter() if x.tag.endswith("}text")]
    assert {"softmax", "conv,linear", "16: 16x2", "16: 16x4", "state, bytes a row"} <= set(words)
    assert 'href="http' not in svg, "readable offline"
    assert svg == standalone(recall_page.figure(kept["recall"])), "the same numbers, the same file"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, r"config\.widths is empty"),
        ({"patterns": ("softmax", "softmax")}, r"config\.patterns=.* names one twice"),
        ({"learning_rates": (1e-2, 0.01)}, r"config\.learning_rates=.* names one twice"),
        ({"learning_rates": (1e-2, 1.0000001e-2)}, "two points would share the file"),
        ({"solved": 0.0}, r"solved=0\.0 must lie in \(0, 1\]"),
        ({"patterns": ("softmaxx",)}, "did you mean 'softmax'"),
        ({"steps": 0}, r"problems\.16\.steps=0"),
        ({"batch_size": 100}, "examples=64 make no batch of 100"),
        ({"test": ()}, r"problems\.16\.test is empty"),
        ({"learning_rates": (0.0,)}, "peak_learning_rate=0"),
        ({"nothing": 1}, "unknown key config.nothing"),
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


@pytest.mark.slow
def test_the_command_resumes_and_says_where_it_ran(tmp_path: Path) -> None:
    workdir = tmp_path / "study"
    config = "--config=experiments/recall/config.py:smoke"
    command = [sys.executable, "-m", "launch.recall", config, f"--workdir={workdir}"]

    def launch(*more: str) -> tuple[int, str, str]:
        process = launched.start([*command, *more])
        out, err = process.communicate()
        return process.returncode, out, err

    status, out, err = launch()
    assert status == 0, err
    kept = json.loads((workdir / "recall.json").read_text())
    assert kept["command"] == f"python -m launch.recall {config} --workdir=DIR"
    assert [row["steps"] for row in kept["recall"]] == [[4], [4]]
    assert recall_page.table(kept["recall"]) in out
    assert len(err.splitlines()) == 4, "a line for each training"
    status, again, err = launch()
    assert (status, again, err) == (0, out, "")
    status, _, err = launch("--config.solved=0.5")
    assert status == 2
    assert "another config (solved: 0.99 -> 0.5)" in err


def test_examples_of_test_and_training_differ_by_seed() -> None:
    setting = mqar.Setting(length=16, pairs=2)
    train = mqar.examples(setting, 384, 50, [0, recall.TRAIN, 0])
    test = mqar.examples(setting, 384, 50, [0, recall.TEST, 0])
    assert np.any(train.tokens != test.tokens, axis=1).all()
