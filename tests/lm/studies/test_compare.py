"""The study of mixers: sizes are equal, nothing is trained twice, and mistakes are reported before
any training.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.base import get_config
from lm import metrics, train
from lm.config import UserError
from lm.evaluation import evaluate, statistics
from lm.evaluation.scoring import Cost
from lm.parallel import mesh
from lm.report import compared, comparison, verdicts
from lm.report.compared import Answer, Asked, Curve, Row
from lm.studies import answers, compare, measure, sizes
from lm.studies import study as study_lib
from lm.studies.study import Study
from tests.lm import tiny
from tests.lm.lab import sources, write_corpus
from tests.lm.studies import rows as rows_lib

SMALL = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "ffn_dim": 640,
}


def values(**changes: Any) -> dict[str, Any]:
    run: Any = get_config().to_dict()
    run["model"] |= SMALL
    run["data"] |= {"context_length": 32, "batch_size": 8}
    run["data"]["tokenizer"] |= {"kind": "bytes", "vocab_size": tiny.VOCAB}
    run["schedule"]["warmup"] = "0 steps"
    run["run"]["length"] = "2 steps"
    run["evaluate"]["max_tokens"] = 128
    run["log"]["samples"] = ()
    study = {
        "question": "Which?",
        "run": run,
        "patterns": ("softmax", "retnet"),
        "variants": {},
        "primary": ({"task": "bits_per_byte", "pattern": "retnet", "against": "softmax"},),
        "seeds": (0, 1),
        "tuned_on": (),
        "tasks": {"position": {"max_tokens": 64}},
        "recall": {},
        "timing_rounds": 1,
        "decode_contexts": (8,),
    }
    return study | changes


def test_sizes_are_made_equal_by_the_feed_forward_width() -> None:
    study = study_lib.create(
        values(patterns=("softmax", "retnet", "gla", "softmax,gated_deltanet"))
    )
    solved = study_lib.equal_sizes(study)
    assert solved["softmax"] == (640, 2)
    found = {}
    for pattern, size in solved.items():
        assert size.ffn_dim % sizes.GRAIN == 0
        assert size.num_layers == 2
        found[pattern] = measure.parameters(study_lib.build(study, pattern, size))
    target = found["softmax"]
    assert target == 2 * (4 * 32 * 32 + 3 * 32 * 640 + 2 * 32) + 32
    assert all(abs(size - target) <= 0.01 * target for size in found.values()), found


def test_a_mixer_too_large_is_refused_before_training(tmp_path: Path) -> None:
    mapping = values()
    mapping["run"]["model"]["ffn_dim"] = 8
    with pytest.raises(UserError, match=r"'retnet' has .* set a larger run\.model\.ffn_dim"):
        compare.run(study_lib.create(mapping), tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patterns": ()}, r"config\.patterns is empty"),
        ({"seeds": ()}, r"config\.seeds is empty"),
        ({"seed": (1,)}, "seed"),
        ({"patterns": ("softmax", "retnett"), "primary": ()}, "did you mean 'retnet'"),
        ({"patterns": ("softmax", "glaa")}, "glaa.*did you mean 'gla'"),
        ({"timing_rounds": 0}, "timing_rounds=0"),
        ({"seeds": (1, 1)}, "names one twice"),
        ({"decode_contexts": (0,)}, "must be positive"),
        ({"tuned_on": (3, 1)}, r"has 1, under which settings were chosen .*take it out of seeds"),
        (
            {"patterns": ("softmax",)},
            r"primary\[0\]\.pattern='retnet' is not in the study; set config\.primary too",
        ),
        ({"variants": {"a": {"of": "gla", "layers": {}}}}, r"variants\.a\.of='gla'"),
        (
            {"variants": {"a": {"of": "softmax", "layers": {"softmax": {"windo": 1}}}}},
            "did you mean 'window'",
        ),
        ({"tasks": {"positions": {}}}, r"config\.tasks\.positions: unknown task"),
        ({"variants": {"a/b": {"of": "softmax", "layers": {}}}}, r"'a/b' is to be part of a file"),
        (
            {"variants": {x: {"of": "softmax", "layers": {}} for x in ("a,b", "a+b")}},
            r"share the folder a\+b;",
        ),
    ],
)
def test_mistakes_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        study_lib.create(values(**changes))
    assert "\n" not in str(caught.value)


def test_depth_is_solved_where_no_layer_has_a_feed_forward() -> None:
    mapping = values(patterns=("softmax", "bare", "bare,other"), primary=())
    layers = {"bare": {"mixer": "retnet", "mlp": "none"}, "other": {"mixer": "gla", "mlp": "none"}}
    mapping["run"]["model"]["layers"] = layers
    study = study_lib.create(mapping)
    solved = study_lib.equal_sizes(study)
    target = measure.parameters(study_lib.build(study, "softmax", solved["softmax"]))
    for pattern, period in (("bare", 1), ("bare,other", 2)):
        assert solved[pattern].num_layers % period == 0
        found = measure.parameters(study_lib.build(study, pattern, solved[pattern]))
        layer = found / solved[pattern].num_layers
        assert abs(found - target) <= 0.51 * layer * period, (found, target)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("compare") / "corpus")


def test_a_task_that_cannot_be_asked_is_refused_before_training(
    tmp_path: Path, corpus: Path
) -> None:
    mapping = values(tasks={"forgetting": {"segment": 64}})
    mapping["run"]["data"]["sources"] = sources(corpus)
    with pytest.raises(UserError, match=r"segment=64 twice .* do not fit"):
        compare.run(study_lib.create(mapping), tmp_path / "study", tmp_path / "data")
    assert not (tmp_path / "study").exists()


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[str]]:
    """Two lists that fill from now on: what is trained (training itself is replaced), and the
    labels of the tasks that are scored.
    """
    trained: list[Any] = []
    scored: list[str] = []
    monkeypatch.setattr(train, "run", lambda *x: trained.append(x))
    evaluate_run = evaluate.run

    def run(questions: Any, *args: Any, **options: Any) -> Any:
        scored.extend(questions)
        return evaluate_run(questions, *args, **options)

    monkeypatch.setattr(evaluate, "run", run)
    return trained, scored


def _nothing_again(
    study: Study,
    changes: dict[str, Any],
    rows: list[Row],
    workdir: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second call takes every result from the workdir; in another workdir, from the table. If a
    task has other options, only that task is scored again.
    """
    kept = compared.load(workdir / "compare.json")
    trained, scored = counted(monkeypatch)
    again = compare.run(study, workdir, data)
    assert again is not None
    assert again == rows, "and its timing"
    assert not trained
    assert not scored
    elsewhere = compare.run(study, workdir / "other", data, table=compare.cells(kept))
    assert elsewhere is not None
    assert not trained, "its table holds them"
    assert [row.tasks for row in elsewhere] == [row.tasks for row in kept.rows]
    assert [row.curve for row in elsewhere] == [row.curve for row in kept.rows]
    assert not scored
    other = study_lib.create(values(**changes, tasks={"position": {}}))
    compare.run(other, workdir, data)
    assert scored == ["position"] * 4
    damaged = workdir / "gla-1" / "tasks-gla.json"
    damaged.write_text(damaged.read_text()[:100])
    with pytest.raises(UserError, match=r"tasks-gla\.json is damaged; remove it to ask"):
        compare.run(other, workdir, data)


def test_the_whole_study(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of the smallest size is really trained, scored, timed and written.

    A second call repeats nothing. If a task has other options, only that task is scored again.
    """
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(mesh, "foreseen", lambda: (1, ("cpu",)))
    run = values()["run"]
    run["model"] |= {"num_layers": 1, "ffn_dim": 512}
    run["data"]["sources"] = sources(corpus)
    run["data"]["batch_size"] = 8
    primary = ({"task": "bits_per_byte", "pattern": "gla", "against": "softmax"},)
    changes = {"run": run, "patterns": ("softmax", "gla"), "primary": primary}
    study = study_lib.create(values(**changes))
    workdir, data = tmp_path / "study", tmp_path / "data"
    reported: list[list[Row]] = []
    rows = compare.run(study, workdir, data, report=reported.append)
    assert rows is not None
    assert [[len(row.cells) for row in rows] for rows in reported] == [[1, 1]], (
        "after the first seed"
    )
    assert [row.pattern for row in rows] == ["softmax", "gla"]
    softmax = rows[0]
    # Per token: k and v of one layer, and a segment id. Per row: a length, and the model's next
    # position.
    assert softmax.state_bytes == {n: n * (2 * 32 * 4 + 4) + 4 + 4 for n in (8, 32)}
    assert set(softmax.decode_seconds) == {8}
    assert softmax.peak_bytes
    assert softmax.peak_bytes > 3 * 4 * softmax.parameters, "parameters and two moments"
    assert softmax.curve
    assert [len(curve) for curve in softmax.curve.bits] == [2, 2]
    last = metrics.read(workdir / "softmax-1")[-1]
    asked = softmax.tasks["bits_per_byte"].seeds[1].numbers
    assert asked["bpb/held"].value == pytest.approx(last["eval/held/bpb"], rel=1e-6)

    recalls = compare.recalled(study, workdir)
    assert recalls is not None
    compare.write(study, rows, recalls, {"commit": "0", "command": "c"}, workdir)
    saved = json.loads((workdir / "compare.json").read_text())
    assert [x["outcome"] for x in saved["verdicts"]] == ["none"], "two seeds are too few"
    assert [x["task"] for x in saved["differences"]] == ["position loss"]
    assert [x["pattern"] for x in saved["speed_ups"]] in ([], ["gla"])
    assert "| softmax |" in (workdir / "compare.md").read_text()
    kept = compared.load(workdir / "compare.json")
    assert [row.pattern for row in kept.rows] == ["softmax", "gla"]
    assert compared.to_plain(kept) == saved, "a committed file gives its page again"
    assert comparison.page(kept) == (workdir / "compare.html").read_text()
    page = (workdir / "compare.html").read_text()
    assert page.count("<svg") == 3 + 1, "and one for a phone"
    assert not re.search(r"(?:src|href)=\"http", page)
    assert {path.stem for path in workdir.glob("*.svg")} == {"loss", "position", "decode"}

    _nothing_again(study, changes, rows, workdir, data, monkeypatch)


def test_a_warning_about_every_run_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    new_only = compare._new_only()
    evaluate.log.addFilter(new_only)
    try:
        for word in ("end", "end", "half"):
            evaluate.log.warning("evaluated at the %s", word)
    finally:
        evaluate.log.removeFilter(new_only)
    assert caplog.messages == ["evaluated at the end", "evaluated at the half"]


def test_answers_know_the_files_of_their_tasks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ask = lambda name: answers.questions({"lambada": {"path": str(tmp_path / name)}}, 64).asked
    path.write_text('{"text": "one two"}\n')
    before = ask("*.jsonl")
    assert ask("*.jsonl") == before
    path.write_text('{"text": "one six"}\n')
    assert ask("*.jsonl")["lambada"] != before["lambada"]
    assert ask("*.jsonl")["bits_per_byte"] == before["bits_per_byte"]
    assert answers.digest(str(tmp_path)) != answers.digest(str(tmp_path / "none"))
    more = answers.questions({}, 128).asked
    assert more["bits_per_byte"] != before["bits_per_byte"]


def test_the_page_names_no_winner_without_a_verdict() -> None:
    """The committed study has two seeds, so each of its primary comparisons lacks a verdict."""
    found = compared.load(Path(__file__).parents[3] / "experiments/compare/compare.json")
    assert {x.outcome for x in found.verdicts} == {"none"}
    page = comparison.page(found)
    assert "least bits per byte" not in page
    assert '<div class="name">bits per byte</div><div class="value">no verdict</div>' in page
    assert "the top is cut off" in page
    assert re.search(r"\| \d\.\d{4} \(seeds: \d\.\d{4}, \d\.\d{4}\) \|", comparison.tables(found))
    won = found.verdicts[-1]._replace(pattern="stickbreaking", outcome="better")
    page = comparison.page(dataclasses.replace(found, verdicts=(won,)))
    assert (
        '<div class="name">least bits per byte</div><div class="value">stickbreaking</div>' in page
    )
    far, near = (1.26, 0.02, 100.15), (1.26, 0.9, 1.8)
    wide = compared.SpeedUp("gla", far, near, (1.26, None, None))
    body, _ = verdicts.speed_ups(dataclasses.replace(found, speed_ups=(wide,)))
    assert body == [["gla", "undetermined", "1.26 (0.90 to 1.80)", "1.26"]]


def test_a_run_that_diverged_is_written(tmp_path: Path) -> None:
    """One run has a loss that is not finite; compare.json and the page are still written."""
    study = study_lib.create(values(variants={"wide": {"of": "softmax", "layers": {}}}))
    spread = np.arange(40) % 7

    def row(name: str, bits: list[float]) -> Row:
        numbers = [statistics.mean(x + spread) for x in bits]
        seeds = tuple(Answer({"bpb": x}, Cost(1, 1.0, 1.0)) for x in numbers)
        curve = Curve((1.0, 2.0), tuple((x, x) for x in bits)) if name != "wide" else None
        asked = {"bits_per_byte": Asked("bpb", "lower", "bits", seeds)}
        return rows_lib.row(name, peak_bytes=1, state_bytes={32: 1}, curve=curve, tasks=asked)

    rows = [row("softmax", [2.0, 2.1]), row("retnet", [math.nan, 2.0]), row("wide", [2.0, 2.1])]
    compare.write(study, rows, [], {}, tmp_path)
    text = (tmp_path / "compare.json").read_text()
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert [v["outcome"] for v in saved["verdicts"]] == ["diverged"]
    assert [v["pattern"] for v in saved["differences"]] == ["wide"]
    assert "retnet diverged" in (tmp_path / "compare.md").read_text()
    assert compared.to_plain(compared.load(tmp_path / "compare.json")) == saved


@pytest.mark.parametrize("text", ["{", "{}", '{"rows": 3}', "[" * 100_000, "null", ""])
def test_a_file_that_is_not_a_comparison(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is damaged.*; name the compare\.json"):
        compared.load(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: no such file; name the compare\.json"):
        compared.load(tmp_path / "b.json")


def _first_task(row: dict[str, Any]) -> dict[str, Any]:
    return next(iter(row["tasks"].values()))


DAMAGE = {
    "no rows": lambda page: page.update(rows=[]),
    "a row twice": lambda page: page["rows"].append(page["rows"][0]),
    "a seed less": lambda page: _first_task(page["rows"][1])["seeds"].pop(),
    "no seeds": lambda page: page.update(seeds=[]),
    "another headline": lambda page: _first_task(page["rows"][1]).update(headline="x"),
    "a task less": lambda page: page["rows"][1]["tasks"].popitem(),
    "cells": lambda page: page["rows"][0].update(cells=["a"] * 9),
    "a primary without a task": lambda page: page["primary"][0].pop("task"),
    "a primary of a list": lambda page: page["primary"][0].update(pattern=["a"]),
    "a word": lambda page: next(
        iter(_first_task(page["rows"][1])["seeds"][0]["numbers"].values())
    ).update(value="x"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_comparison_that_is_damaged(tmp_path: Path, name: str) -> None:
    page = json.loads(
        (Path(__file__).parents[3] / "experiments/length/compare.json").read_text(encoding="utf-8")
    )
    DAMAGE[name](page)
    (tmp_path / "a.json").write_text(json.dumps(page))
    with pytest.raises(UserError, match=r"a\.json is damaged: .*; name the compare\.json"):
        compared.load(tmp_path / "a.json")
