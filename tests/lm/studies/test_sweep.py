"""Sweeps: which runs a grid stands for, how each is trained once, and the resulting table."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lm import metrics, train
from lm.config import Config, UserError, to_mapping
from lm.report import sweep as page
from lm.run import checkpoint
from lm.studies import cells, grid, rows, sweep
from lm.studies.rows import Outcome, Row
from lm.studies.trainer import Trainer
from lm.train import Options
from tests.lm import lab, tiny

RATE = "schedule.peak_learning_rate"
LENGTHS = ("8 steps", "12 steps", "16 steps")


def values(corpus: Path, *grids: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A sweep over the tests' tiny run."""
    small = {"schedule.decay": "25 percent", "checkpoint.every": "100 percent"}
    text = {"text": lab.sources(corpus)["text"]}
    run = tiny.config(lab.CHANGES | small | {"data.sources": text})
    given = grids or ({RATE: (0.01, 0.02), "run.length": LENGTHS},)
    return {"run": to_mapping(run), "grids": given, "min_steps": 0, "halving": 0} | changes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.write_corpus(tmp_path_factory.mktemp("sweep") / "corpus")


pytestmark = pytest.mark.usefixtures("one_device")


def train_alone(config: Config, workdir: Path, data_dir: Path) -> int:
    """Trains a run outside of any sweep and returns its steps."""
    done = train.run(
        config, Options(workdir=workdir, data_dir=data_dir, like=Trainer(data_dir).like(config))
    )
    assert done.finished
    return done.step


def plan(corpus: Path, *grids: dict[str, Any], **changes: Any) -> dict[cells.Cell, cells.Planned]:
    return sweep.plan(sweep.create(values(corpus, *grids, **changes)))


def test_lengths_are_branches_of_one_trunk(corpus: Path) -> None:
    found = plan(corpus)
    assert [(cell.steps, one.start) for cell, one in found.items()] == [
        (8, 6),
        (12, 9),
        (16, 12),
    ] * 2
    assert len({cell.trunk for cell in found}) == 2
    assert len({cell.digest for cell in found}) == 6
    one = next(iter(found.values()))
    assert str(one.config.schedule.decay) == "2 steps"
    assert (str(one.trunk.schedule.decay), one.trunk.run_steps) == ("0 steps", 6)


def test_what_a_trunk_depends_on(corpus: Path) -> None:
    axes = {"schedule.decay_shape": ("linear", "sqrt"), "run.length": ("16 steps",)}
    assert len({cell.trunk for cell in plan(corpus, axes)}) == 1
    percent = {"schedule.warmup": ("25 percent",), "run.length": LENGTHS}
    assert len({cell.trunk for cell in plan(corpus, percent)}) == 3
    cosine = {"schedule": ("cosine",), "schedule.warmup": ("2 steps",), "run.length": LENGTHS}
    found = plan(corpus, cosine)
    assert [one.start for one in found.values()] == [None] * 3
    assert all(cell.trunk == cell.digest for cell in found)


def test_equal_cells_of_two_grids_are_one(corpus: Path) -> None:
    both = {RATE: (0.01, 0.02), "seed": (0,)}, {"seed": (0, 1), RATE: (0.02,)}
    assert len(plan(corpus, *both)) == 3
    widths = plan(corpus, {"width": (32, 64)})
    assert [one.config.model.num_heads for one in widths.values()] == [4, 8]
    assert len(plan(corpus, min_steps=12)) == 4


def test_a_cell_depends_on_the_text_and_not_on_its_path(corpus: Path, tmp_path: Path) -> None:
    moved = lab.write_corpus(tmp_path / "elsewhere")
    assert plan(corpus).keys() == plan(moved).keys()
    (moved / "00.txt").write_text("another text")
    assert not plan(corpus).keys() & plan(moved).keys()


@pytest.mark.parametrize(
    ("axes", "reported"),
    [
        ({}, "grids is empty"),
        ({"schedule.peak": (1.0,)}, "schedule.peak=1.0: unknown option config.schedule.peak"),
        ({"shedule.a": (1.0,)}, "no key 'shedule.a' in a run; did you mean 'schedule.a'"),
        ({"sed": (1,)}, "unknown key config.sed; did you mean 'seed'"),
        ({"seed": ()}, "seed has no values"),
        ({"seed": (1, 1)}, "seed has the value 1 twice"),
        ({"seed": 3}, r"seed=3 is not a list; write \(3,\)"),
        ({RATE: (-1.0,)}, "grid cell schedule.peak_learning_rate=-1.0: .* must be positive"),
        ({"decay_from": ("x",)}, "decay_from is set by the sweep itself"),
        ({"width": (33,)}, "grid cell width=33: .* is not whole at width 33"),
        ({"run.length": ("4 steps",), "schedule.warmup": ("9 steps",)}, "shorten them"),
    ],
)
def test_a_grid_that_is_refused(corpus: Path, axes: dict[str, Any], reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        plan(corpus, axes)


def test_cells_that_are_all_too_short(corpus: Path) -> None:
    with pytest.raises(UserError, match="longest cell of the grid has 16 steps, min_steps is 99"):
        plan(corpus, min_steps=99)
    for changes in ({"min_steps": -1}, {"halving": 1}):
        with pytest.raises(UserError, match="must be"):
            plan(corpus, **changes)


def test_a_percentage_is_of_the_run_and_not_of_its_trunk(corpus: Path) -> None:
    """So runs of two lengths have two trunks, each with the cooldown of its own run."""
    schedule = {"family": "infinite", "cooldown": "50 percent", "warmup": "0 steps"}
    schedule["decay"] = "2 steps"
    axes = {"schedule": (schedule,), "run.length": LENGTHS}
    found = list(plan(corpus, grids=(axes,)).values())
    assert len({json.dumps(to_mapping(one.trunk.schedule)) for one in found}) == len(LENGTHS)
    for one in found:
        trunk = one.trunk.schedule.cooldown
        assert (trunk.value, trunk.unit) == (0.5 * one.config.run_tokens, "tokens")


def pretend(
    monkeypatch: pytest.MonkeyPatch, loss: Any = lambda one: 2.0, stops_at: int = -1
) -> list[tuple[float, int]]:
    """Replaces training. Returns the (rate, steps) of each cell that is worked on."""
    worked: list[tuple[float, int]] = []

    def call(self: Any, cell: cells.Cell, place: Path) -> Outcome | None:
        if len(worked) == stops_at:
            return None
        config = self.planned[cell].config
        worked.append((config.schedule.peak_learning_rate, config.run_steps))
        found = loss(config)
        losses = {"text": found} if math.isfinite(found) else {}
        return Outcome("done" if losses else "diverged", losses, 0, 1.0, 10, 5, "c", "cpu")

    monkeypatch.setattr(sweep._Worker, "__call__", call)
    return worked


def test_a_sweep_that_was_stopped_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, reported = sweep.create(values(corpus)), []
    worked = pretend(monkeypatch, stops_at=4)
    assert sweep.run(asked, tmp_path, tmp_path, report=reported.append) is None
    assert (len(worked), [len(found) for found in reported]) == (4, [0, 1, 2, 3, 4])
    again = pretend(monkeypatch)
    found = sweep.run(asked, tmp_path, tmp_path)
    assert found is not None
    assert len(found) == 6
    assert sorted(worked + again) == [(rate, n) for rate in (0.01, 0.02) for n in (8, 12, 16)]
    assert all(a != b for a, b in itertools.pairwise(worked))


def test_a_row_of_a_table_is_not_run_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table grows: rows of other grids stay in it, and cells that it holds are not run."""
    worked = pretend(monkeypatch, lambda config: 3 - config.schedule.peak_learning_rate)
    first = sweep.run(sweep.create(values(corpus)), tmp_path / "a", tmp_path)
    assert first is not None
    rows.write(first, tmp_path / "sweep.jsonl")
    table = rows.read(tmp_path / "sweep.jsonl")
    assert table == first
    more = sweep.create(values(corpus, {RATE: (0.02, 0.04), "run.length": LENGTHS}))
    worked.clear()
    second = sweep.run(more, tmp_path / "b", tmp_path, table=table)
    assert second is not None
    assert [rate for rate, _ in worked] == [0.04] * 3
    assert [row["learning_rate"] for row in second] == [0.02] * 3 + [0.04] * 3, "those asked for"
    grown = rows.merged(second, table)
    assert [row["learning_rate"] for row in grown] == [0.02] * 3 + [0.04] * 3 + [0.01] * 3
    assert {json.dumps(row) for row in first} <= {json.dumps(row) for row in grown}


def test_the_table_as_parquet(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pretend(monkeypatch, lambda config: math.inf if config.schedule.peak_learning_rate > 1 else 2.0)
    axes = {RATE: (0.01, 9.0), "model.pattern": ("softmax", ("softmax", "softmax"))}
    found = sweep.run(sweep.create(values(corpus, axes)), tmp_path, tmp_path)
    assert found is not None
    rows.write(found, tmp_path / "sweep.jsonl")
    columns = parquet.read_table(tmp_path / "sweep.parquet").to_pydict()
    assert columns["loss"] == [row["loss"] for row in found] == [2.0, 2.0, None, None]
    assert columns["status"] == ["done", "done", "diverged", "diverged"]
    assert columns["model.pattern"] == ["softmax", '["softmax", "softmax"]'] * 2


@pytest.mark.parametrize(
    "line", ["{", "3", '{"cell": "a"}', '{"loss": NaN}'], ids=["cut", "number", "short", "nan"]
)
def test_a_table_that_is_damaged(tmp_path: Path, line: str) -> None:
    (tmp_path / "sweep.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"sweep.jsonl:1 is not a row of a sweep"):
        rows.read(tmp_path / "sweep.jsonl")


def test_successive_halving(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four rates, two continue to the second length and one to the third. Losses are averaged
    over seeds.
    """
    rates = (0.01, 0.02, 0.04, 0.08)
    loss = {0.01: 3.0, 0.02: 2.0, 0.04: 1.0, 0.08: math.inf}
    worked = pretend(
        monkeypatch, lambda c: loss[c.schedule.peak_learning_rate] + (c.seed - 0.5) * 3
    )
    axes = {"seed": (0, 1), RATE: rates, "run.length": LENGTHS}
    found = sweep.run(sweep.create(values(corpus, axes, halving=2)), tmp_path, tmp_path)
    assert found is not None
    by_length = {n: {rate for rate, steps in worked if steps == n} for n in (8, 12, 16)}
    assert by_length == {8: set(rates), 12: {0.02, 0.04}, 16: {0.04}}
    assert len(worked) == len(found) == 2 * (4 + 2 + 1)


def test_a_branch_is_the_run_of_its_own(corpus: Path, tmp_path: Path) -> None:
    """It equals that run bit for bit, though its trunk was stopped and resumed, and an earlier cell
    decayed from it.
    """
    asked = sweep.create(values(corpus, {"run.length": LENGTHS[:2]}))
    found = sweep.run(asked, tmp_path / "sweep", tmp_path / "data")
    assert found is not None
    for row, (cell, one) in zip(found, sweep.plan(asked).items(), strict=True):
        alone = tmp_path / f"alone-{cell.steps}"
        assert train_alone(one.config, alone, tmp_path / "data") == row["steps"] == cell.steps
        assert metrics.read(alone)[-1]["eval/text/loss"] == row["loss"]
        assert (row["tokens"], row["seed"], row["width"]) == (cell.steps * 128, 0, 32)
        assert row["parameters"] - row["body_parameters"] == 384 * 32
    left = [path.name for path in (tmp_path / "sweep" / "cells").iterdir()]
    assert sorted(left) == sorted(grid.name(cell) for cell in sweep.plan(asked)), "no trunk is left"
    assert not list((tmp_path / "sweep").rglob(checkpoint.FOLDER))


def test_a_trunk_that_is_too_far_begins_again(corpus: Path, tmp_path: Path) -> None:
    """A shorter length is added when the trunk is already past its branch point."""
    longer = sweep.create(values(corpus, {"run.length": ("12 steps",)}))
    both = sweep.create(values(corpus, {"run.length": ("8 steps", "12 steps")}))
    alone = sweep.run(both, tmp_path / "alone", tmp_path / "data")
    (cell,) = sweep.plan(longer)
    trunk = tmp_path / "sweep" / "cells" / f"trunk-{cell.trunk}"
    train_alone(sweep.plan(longer)[cell].trunk, trunk, tmp_path / "data")
    assert alone is not None
    again = sweep.run(both, tmp_path / "sweep", tmp_path / "data")
    assert again is not None
    assert _losses(again) == _losses(alone)


def _losses(found: Iterable[Row]) -> list[Any]:
    return [row["loss"] for row in found]


def test_a_cell_that_diverges(corpus: Path, tmp_path: Path) -> None:
    """It is stopped and recorded, and the other cells of its grid are trained."""
    axes = {"schedule.a": (1e33, 4.0), RATE: (1e30,), "run.length": ("16 steps",)}
    asked = sweep.create(values(corpus, axes))
    found = sweep.run(asked, tmp_path / "sweep", tmp_path / "data")
    assert found is not None
    assert [row["status"] for row in found] == ["diverged", "done"]
    assert [row["skipped"] for row in found] == [10, 0]
    assert found[0]["loss"] is None
    assert found[1]["loss"] < 6
    assert sweep.run(asked, tmp_path / "sweep", tmp_path / "data") == found


def row(**changes: Any) -> Row:
    known = {"cell": "a", "trunk": "b", "status": "done", "seconds": 1.0, "steps": 5, "width": 32}
    return known | {"learning_rate": 0.01, "tokens": 1000, "seed": 0, "loss": 2.0} | changes


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    losses = {0.01: 2.0, 0.02: 1.5, 0.04: 1.8}
    table = [
        row(learning_rate=rate, tokens=tokens, seed=seed, width=width, loss=loss - tokens / 1e4)
        for rate, loss in losses.items()
        for tokens in (1000, 2000)
        for seed in (0, 1)
        for width in (32, 64)
    ]
    table.append(row(learning_rate=0.08, width=64, loss=None, status="diverged"))
    found = page.panels(table)
    assert [panel.title for panel in found] == ["width 32", "width 64"]
    assert [panel.best(1000) for panel in found] == [0.02, 0.02]
    assert not found[0].is_edge(1000)
    assert math.isinf(found[1].means(1000)[0.08])
    assert page.panels([row()])[0].is_edge(1000), "of one rate nothing is known beyond it"
    page.write(table, tmp_path / "sweep.html")
    html = (tmp_path / "sweep.html").read_text()
    assert html.count("<svg") == 2 * 2, "each once more for a phone"
    drawn = {path.name for path in (tmp_path / "sweep_figures").iterdir()}
    assert drawn == {"loss.svg", "map.svg"}
    assert html.count(">tokens</text>") == 2 * (1 + 2), "one legend, and an axis of either map"
    assert "1 diverged" in html
    assert "| width 32 | 1.00 k | 0.02 | 1.4000 | 2 |  |" in page.table(table)


def test_titles_of_panels_lie_within_their_panels(tmp_path: Path) -> None:
    """A column that a row lacks is not named, and a long title has several lines."""
    keys = {f"model.option_number_{i}": (None, 1) for i in range(4)}
    table = [
        row(learning_rate=rate, **{key: values[i] for key, values in keys.items()})
        for rate in (0.01, 0.02)
        for i in (0, 1)
    ]
    assert [panel.title for panel in page.panels(table)] == ["", ", ".join(f"{k} 1" for k in keys)]
    page.write(table, tmp_path / "sweep.html")
    drawn = (tmp_path / "sweep_figures" / "loss.svg").read_text()
    titles = re.findall(r">([^<>]*option_number[^<>]*)</t", drawn)
    assert len(titles) > 1
    assert all(len(title) <= page.LETTERS for title in titles)


def test_settings_of_one_value_are_not_named() -> None:
    assert page.panels([row(), row(seed=1)])[0].title == ""
    with pytest.raises(UserError, match=r"missing key config\.halving"):
        sweep.create({"run": {}, "grids": (), "min_steps": 0})


def test_a_sweep_from_flags() -> None:
    axes, none = {"seed": (0, 1)}, {"min_steps": None, "halving": None}
    bare = sweep.completed({"seed": 0}, axes, none)
    assert bare == {"run": {"seed": 0}, "grids": ({"seed": (0, 1)},), "min_steps": 0, "halving": 0}
    given = bare | {"grids": ({"seed": (5,), "width": (1,)}, {"width": (2,)})}
    found = sweep.completed(given, axes, none | {"halving": 3})
    assert found["grids"] == ({"seed": (0, 1), "width": (1,)}, {"width": (2,), "seed": (0, 1)})
    assert found["halving"] == 3
