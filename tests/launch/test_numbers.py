"""README.md says what the files in results/ say."""

from __future__ import annotations

import json
from pathlib import Path

from launch import numbers


def test_readme_holds_the_committed_numbers() -> None:
    text = (numbers.ROOT / "README.md").read_text()
    assert numbers.BLOCK.search(text)
    assert numbers.filled(text) == text, "run python -m launch.numbers"


def test_every_result_file_says_where_it_comes_from() -> None:
    for path in Path(numbers.ROOT, "results").rglob("*.json"):
        values = json.loads(path.read_text())
        assert values["command"].startswith("python -m launch."), path
        assert len(values["commit"]) >= 40, path
        assert values["cpu"], path


def test_a_missed_goal_is_said() -> None:
    goal = {"relation": "<=", "bound": 1.05, "met": False}
    head = {"command": "c", "commit": "0" * 40, "cpu": "x", "cores": 2, "date": "2026-01-01T00"}
    text = numbers.render(head | {"results": [{"name": "n", "value": 2.0, "goal": goal}]})
    assert "| n | 2 | <= 1.05 (missed) |" in text
