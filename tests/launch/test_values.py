"""The grammar of values on a command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from launch import members, values
from lm.families import SCHEDULES
from lm.mapping import POSITIVE, Duration, UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -1e-3),
        ("1_000", 1000),
        ("true", True),
        ("False", False),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("(1, 'a')", (1, "a")),
        ("[a, [b, true], None]", ("a", ("b", True), None)),
        ('{"a": [1, null], b: {}}', {"a": (1, None), "b": {}}),
        ("'10'", "10"),
        ('"a, b"', "a, b"),
        ("((1,gla),(2,softmax))", ((1, "gla"), (2, "softmax"))),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert values.literal(text) == value


WORDS = ["", " ", "softmax", "a,b", "1,2", "10 percent", "1e6 tokens", "a/*.md", "~/x", "[ab]*.txt"]
WORDS += ["1+2j", "-true", "1 if x else 2", "{1: 2, **x}", "f(1)", "b'a'", "none", "(1,", "007"]
WORDS += ["(" * 300, "9" * 5000, "def main(", "a\nb", "{(1,): 2}", "runs/a/checkpoints/250", "-"]


@pytest.mark.parametrize("text", WORDS, ids=range(len(WORDS)))
def test_words(text: str) -> None:
    assert values.literal(text) is text


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str, "10", "10"),
        (str, "true", "true"),
        (str, "'a b'", "a b"),
        (Annotated[str, "mark"], "[a", "[a"),
        (Duration, "10 percent", "10 percent"),
        (Literal["none", "full"], "none", "none"),
        pytest.param(Annotated[float, POSITIVE], "3", 3, id="positive-3-3"),
        (float, "-inf", -math.inf),
        (tuple[str, ...], "H,G", ("H", "G")),
        (tuple[str, ...], "10", ("10",)),
        (tuple[str, ...], "'a, b'", ("a, b",)),
        (tuple[str, ...], "", ()),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[float, ...], "1,2e3", (1, 2e3)),
        (Mapping[str, int], "{a: 1}", {"a": 1}),
        (Any, "((2,'a,b'),)", ((2, "a,b"),)),
        (None, "[ab", "[ab"),
    ],
    ids=str,
)
def test_values_are_read_by_the_type_of_their_key(kind: Any, text: str, value: Any) -> None:
    assert values.read(kind, text, "x") == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (int, "3.5", "x=3.5 is not an integer"),
        (int, "true", "x=true is not an integer"),
        (float, "many", "x=many is not a number"),
        (bool, "1", "x=1 is not true or false"),
        (tuple[int, ...], "1,b", "x=b is not an integer"),
        (Any, "((1,'a')", "does not read as a value; close its brackets and quote its words"),
        (tuple[str, ...], "(a/b, c)", "quote its words"),
        (Mapping[str, int], "[1]", "is not a dict; write {'key': value}"),
    ],
    ids=str,
)
def test_bad_values_are_refused(kind: Any, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        values.read(kind, text, "x")
    assert message in str(caught.value)


def test_options_of_members() -> None:
    assert members.layers(["a.qk_norm=True", "softmax.position_encoding=none"]) == {
        "a": {"qk_norm": True},
        "softmax": {"position_encoding": "none"},
    }
    asked = ["blimp.path=2024", "position", "mine.task=mqar", "mine.pairs=4", "other.x=[1,b]"]
    assert members.tasks(asked) == {
        "position": {},
        "blimp": {"path": "2024"},
        "mine": {"task": "mqar", "pairs": 4},
        "other": {"x": (1, "b")},
    }
    message = members.member("schedule", "wsd:final_ratio=0.1,decay=10 percent", SCHEDULES)
    assert message == {"family": "wsd", "final_ratio": 0.1, "decay": "10 percent"}
    with pytest.raises(UserError, match=r"--task=mqar\.pairs=few is not an integer"):
        members.tasks(["mqar.pairs=few"])
