"""Values that a configuration may meet at its edges: written out and read back, nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest

from lm.mapping import Duration, UserError, convert, difference, flatten, nearest, to_mapping
from tests.lm import tiny


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.0, "steps", "5 steps"),
        (0.0, "tokens", "0 tokens"),
        (12.5, "percent", "12.5 percent"),
        (1e6, "tokens", "1e+06 tokens"),
        (1234567.0, "tokens", "1234567.0 tokens"),
        (123456.7, "tokens", "123456.7 tokens"),
        (100 / 3, "percent", "33.333333333333336 percent"),
        (2.0**53 - 1, "tokens", "9007199254740991.0 tokens"),
    ],
)
def test_durations_keep_every_digit(value: float, unit: Any, text: str) -> None:
    duration = Duration(value, unit)
    assert str(duration) == to_mapping(duration) == text
    assert Duration.parse(text, "x") == duration


@pytest.mark.parametrize("text", ["", "steps", "1 2 steps", "1 Steps", "1_0 m", "-0.1 steps"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError, match="x="):
        convert(Duration, text, "x")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1.0),
        (int, True),
        (int, None),
        (float, False),
        (float, "1"),
        (float, float("inf")),
        (float, 10**400),
        (bool, 0),
        (str, b"a"),
        (Literal["a", "b"], "c"),
        (Literal["a", "b"], ["a"]),
        (tuple[int, ...], 3),
        (tuple[int, ...], "12"),
        (tuple[int, ...], [1, "2"]),
        (Mapping[str, int], [1]),
        (Mapping[str, int], {"a": "1"}),
        (Duration, 3),
    ],
    ids=lambda x: str(x)[:20],
)
def test_wrong_types(kind: Any, value: Any) -> None:
    with pytest.raises(UserError, match=r"^x") as caught:
        convert(kind, value, "x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_right_types() -> None:
    assert convert(float, 3, "x") == 3.0
    assert convert(tuple[float, ...], [1, 2.5], "x") == (1.0, 2.5)
    found = convert(Mapping[str, tuple[int, ...]], {"a": [1]}, "x")
    assert dict(found) == {"a": (1,)}
    with pytest.raises(TypeError):
        found["b"] = ()
    assert convert(Any, {"a": [1, {"b": 2}]}, "x")["a"][1]["b"] == 2


def test_flatten_and_difference() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2]}
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}, "c": None}) == {}
    assert difference({"a": 1}, {"a": {"b": 1}}) == {"a": (1, None), "a.b": (None, 1)}


def test_nearest() -> None:
    assert nearest("widht", ["width", "depth"]) == "did you mean 'width'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_a_seed_fits_into_32_bits() -> None:
    with pytest.raises(UserError, match=r"seed=2147483648 must lie in \[0, 2\^31\)"):
        tiny.config({"seed": 1 << 31})
    assert tiny.config({"seed": (1 << 31) - 1}).seed == (1 << 31) - 1
