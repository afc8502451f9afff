"""The pages hold the numbers of the committed result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import numbers
from launch.benchmarks import tables
from lm.config import UserError
from tests.lm import test_report

# Earlier versions wrote "python -m launch.".
KINDS = ("espalier ", "python -m launch.", "python -m pytest")


@pytest.mark.parametrize("page", numbers.PAGES)
def test_a_page_holds_the_committed_numbers(page: str) -> None:
    text = (numbers.ROOT / page).read_text()
    assert numbers.BLOCK.search(text)
    assert numbers.filled(text) == text, "run espalier numbers"


def test_every_result_file_says_where_it_comes_from() -> None:
    files = [*Path(numbers.ROOT, "results").rglob("*.json")]
    files += Path(numbers.ROOT, "experiments").rglob("*.json")
    for path in files:
        values = json.loads(path.read_text())
        assert values["command"].startswith(KINDS), path
        assert len(values["commit"]) >= 40, path
        assert values["cpu"], path


def test_losses_of_the_hypergradient_agree_with_its_table() -> None:
    folder = Path(numbers.ROOT, "experiments/hypergradient")
    rows = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    message = json.loads((folder / "hypergradient.json").read_text())["numbers"]
    losses = [x for k, text in message.items() if "multiplier" not in k for x in text.split(", ")]
    assert sorted(losses) == sorted(f"{row['loss']:.3f}" for row in rows)


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    workdir = test_report.make(tmp_path / "run")
    facts = json.loads((workdir / "run.json").read_text()) | {"cpu": "A processor", "cores": 2}
    (workdir / "run.json").write_text(json.dumps(facts))
    values = numbers.summary(workdir)
    assert values["command"] == "espalier train --config=x.py --config.model.width=128 " + (
        "--workdir=a b"
    )
    assert values["numbers"]["tokens per second, median"] == "8,192"
    assert values["numbers"]["validation bits per byte, stdlib"] == f"{5.0 / 40**0.2:.3f}"
    records = (workdir / "metrics.jsonl").read_text().replace("time/", "other/")
    (workdir / "metrics.jsonl").write_text(records)
    with pytest.raises(UserError, match="no record has a time"):
        numbers.summary(workdir)


def test_a_missed_goal_is_marked() -> None:
    goal = {"relation": "<=", "bound": 1.05, "met": False}
    head = {"command": "c", "commit": "0" * 40, "cpu": "x", "cores": 2, "date": "2026-01-01T00"}
    text = tables.render(head | {"results": [{"name": "n", "value": 2.0, "goal": goal}]})
    assert "| n | 2 | <= 1.05 (missed) |" in text
