"""An earlier format is converted to today's; a later format is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lm.config import to_mapping
from lm.mapping import UserError
from lm.run import formats
from tests.lm import tiny


def first_format(family: str) -> dict[str, Any]:
    """A configuration in the first format, in which every schedule had the keys of all
    schedules.
    """
    values = to_mapping(tiny.config())
    values["schedule"] = {
        "family": family,
        "peak_learning_rate": 0.01,
        "a": 4.0,
        "b": -0.51,
        "warmup": "3 steps",
        "decay": "50 percent",
        "decay_shape": "cosine",
        "final_ratio": 0.1,
        "decay_from": "",
    }
    del values["optimizer"]["family"], values["objective"], values["decay_from"]
    for key in ("mlp", "residual", "matrix"):
        del values["model"][key]
    values["mesh"]["sequence_parallel"] = values["mesh"].pop("stream_over_tensor")
    return values


@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        ("power", {"a": 4.0, "b": -0.51, "decay": "50 percent", "decay_shape": "cosine"}),
        ("wsd", {"decay": "50 percent", "decay_shape": "cosine"}),
        ("cosine", {"horizon": "50 percent"}),
    ],
)
def test_the_first_format_is_read(family: str, schedule: dict[str, Any]) -> None:
    old = first_format(family)
    before = copy.deepcopy(old)
    read = formats.read(old, "config.json")
    assert old == before
    shared = {"peak_learning_rate": 0.01, "warmup": "3 steps", "final_ratio": 0.1}
    wanted = {"family": family} | shared | schedule
    written = formats.write(read)
    assert written["schedule"] == wanted
    assert (written["format"], written["decay_from"]) == (formats.FORMAT, "")
    assert formats.read(written, "config.json") == read
    assert read == tiny.config({"schedule": wanted})


def test_a_branch_of_the_first_format_is_read() -> None:
    old = first_format("wsd")
    old["schedule"]["decay_from"] = "runs/trunk"
    assert formats.read(old, "x").decay_from == "runs/trunk"


@pytest.mark.parametrize("number", [0, formats.FORMAT + 1, "2", None, 2.0, True])
def test_an_unknown_format_is_refused(number: Any) -> None:
    with pytest.raises(UserError, match=rf"x has format {number!r}, this version reads up to"):
        formats.read({"format": number}, "x")


@pytest.mark.parametrize("values", [{}, {"schedule": 3, "mesh": {}}, {"format": formats.FORMAT}])
def test_values_that_are_not_a_configuration_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        formats.read(values, "x")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x")
