"""The Python blocks of the README, CONTRIBUTING and the guides run.

tests/launch/test_commands.py runs their commands.
"""

from __future__ import annotations

import re
import types
from typing import Any

import pytest

from experiments import base
from lm.config import Duration, convert, from_mapping
from lm.mapping import UserError
from lm.schedules import Run, Schedule
from lm.studies import study as study_lib
from tests.launch.documents import PAGES, ROOT
from tests.lm.lab import Lab

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(text, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_runs(text: str, lab: Lab) -> None:
    """A block is one of these: an experiment file, a member of a family, values of a configuration,
    what a notebook does with a finished run.
    """
    names: dict[str, Any] = {"__name__": "block"}
    if text.startswith("config."):
        names["config"] = base.get_config()
    code = text.replace('"runs/quickstart"', repr(str(lab.whole)))
    exec(compile(code, "block", "exec", dont_inherit=True), names)
    made = _classes(names)
    if "get_config" in names:
        values = names["get_config"]().to_dict()
        study_lib.create(values) if "patterns" in values else from_mapping(values)
    elif "config" in names and text.startswith("config."):
        from_mapping(names["config"].to_dict())
    elif made:
        _check_schedule(made[0])
    elif "test_halving" in names:
        names["SCHEDULES"] = types.SimpleNamespace(create=_halving)
        names["test_halving"]()
    else:
        assert "lm.load(" in text, "a test knows how to run this block"
        assert names["params"]
        assert names["tokenizer"]


def _classes(names: dict[str, Any]) -> list[Any]:
    kinds = [x for x in names.values() if isinstance(x, type)]
    return [kind for kind in kinds if kind.__module__ == "block"]


def _halving(options: dict[str, Any], where: str) -> Any:
    """Stands in for the family: creates the guide's schedule, which is not in its folder."""
    text = next(x for x in BLOCK.findall((ROOT / "docs/adding.md").read_text()) if "class" in x)
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(text, "block", "exec", dont_inherit=True), names)
    (kind,) = _classes(names)
    given = {key: value for key, value in options.items() if key != "family"}
    lengths = {x: convert(Duration, y, where) for x, y in given.items() if isinstance(y, str)}
    return kind(**given | lengths)


def _check_schedule(kind: type[Any]) -> None:
    """The rate falls below its peak somewhere, and never exceeds it."""
    made = kind(peak_learning_rate=0.01, warmup=Duration(1, "steps"))
    schedule: Schedule = made.schedule(Run(100_000, 100, None))
    rates = [float(schedule(float(tokens))) for tokens in range(1000, 90_000, 1000)]
    assert max(rates) <= 0.01
    assert min(rates) < 0.006


def test_a_wrong_block_is_found(lab: Lab) -> None:
    with pytest.raises(UserError, match="widht"):
        test_a_block_runs("config.model.unlock()\nconfig.model.widht = 3\n", lab)
