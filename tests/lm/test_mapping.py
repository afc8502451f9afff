"""Edge cases of configuration values: after a round trip through text they are unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from lm import mapping
from lm.mapping import (
    POSITIVE,
    Duration,
    Later,
    UserError,
    completed,
    convert,
    difference,
    flatten,
    nearest,
    to_mapping,
)
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
def test_what_is_not_a_duration(text: str) -> None:
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
    assert nearest("wds", ["wsd", "step"]) == "did you mean 'wsd'?"
    assert nearest("vocab", ["vocab_size", "width"]) == "did you mean 'vocab_size'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("mlp", ["mup", "seed"]) == "known: mup, seed"


def test_a_seed_fits_into_32_bits() -> None:
    with pytest.raises(UserError, match=r"seed=2147483648 must be below 2\^31"):
        tiny.config({"seed": 1 << 31})
    assert tiny.config({"seed": (1 << 31) - 1}).seed == (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Numbers:
    count: int
    size: float
    name: str
    span: mapping.Duration
    several: tuple[float, ...]


GOOD = {"count": 1, "size": 1.0, "name": "a", "span": "1 steps", "several": [1.0]}
OUTSIDE: list[tuple[str, Any, str]] = [
    ("count", 1 << 31, "x.count=2147483648 must be below 2^31 in size"),
    ("count", -(1 << 40), "must be below 2^31 in size"),
    ("count", 1 << 63, "must be below 2^31"),
    ("count", 10**5000, "x.count=2^16609 or more must be below 2^31"),  # has no decimal digits here
    ("size", 1e39, "x.size=1e+39 must be 0, or from 1.2e-38 to 3.4e38 in size"),
    ("size", -1e300, "must be 0, or from"),
    ("size", 1e-40, "must be 0, or from"),
    ("size", float("nan"), "x.size=nan must be finite"),
    ("size", 10**5000, "must be finite"),
    ("several", [1.0, 1e200], "x.several[1]=1e+200 must be 0, or from"),
    ("span", "1e17 tokens", "is too long; set at most 9.0e+15"),
    ("span", f"{'9' * 400} steps", "must be a finite duration"),
    ("name", "a\udce9b", "x.name is not UTF-8 at place 1 of 'a\\udce9b'; write it in UTF-8"),
    ("name", "a\0b", "x.name='a\\x00b' holds a NUL; leave it out"),
    ("name", 7 * 10**5000, "or more is a int; set a str"),
]


@pytest.mark.parametrize(("key", "value", "message"), OUTSIDE, ids=range(len(OUTSIDE)))
def test_values_that_no_array_or_file_can_hold(key: str, value: Any, message: str) -> None:
    mapping.convert(Numbers, GOOD, "x")
    with pytest.raises(UserError) as caught:
        mapping.convert(Numbers, GOOD | {key: value}, "x")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_values_that_arrays_can_hold_are_accepted() -> None:
    largest = {"count": (1 << 31) - 1, "size": 3.4e38, "several": [-1.2e-38, 0.0]}
    assert mapping.convert(Numbers, GOOD | largest, "x").size == 3.4e38


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    span: Annotated[Duration, POSITIVE, Later(Duration(5, "steps"))]


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    depth: Annotated[float, Later(1.0)]


def test_a_key_that_came_later_is_read_from_and_written_as_what_came_before() -> None:
    before = {"inner": {"width": 3}}
    assert convert(Outer, before, "x") == Outer(Inner(3, Duration(5, "steps")), 1.0)
    assert to_mapping(convert(Outer, before, "x")) == before
    now = {"inner": {"width": 3, "span": "6 steps"}, "depth": 0.5}
    assert to_mapping(convert(Outer, now, "x")) == now
    assert difference(before, now) == {"depth": (None, 0.5), "inner.span": (None, "6 steps")}
    with pytest.raises(UserError, match=r"missing key x\.inner\.width"):
        convert(Outer, {"inner": {}}, "x")
    with pytest.raises(UserError, match=r"x\.inner\.span=0 steps must be positive"):
        convert(Outer, {"inner": {"width": 3, "span": "0 steps"}}, "x")


def test_a_flag_can_name_a_key_that_came_later() -> None:
    found = completed(Outer, {"inner": {"width": 3}, "else": 1})
    assert found == {"inner": {"width": 3, "span": "5 steps"}, "depth": 1.0, "else": 1}
