"""docs/reference.md and --help_config list every key, with its meaning."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from launch import cli, numbers, presets, reference
from lm import families
from lm.config import Config, flatten
from lm.mapping import FREE, POSITIVE, Count, Duration, Tokens, to_mapping
from lm.report.reference import Key, meanings, sections, text

KINDS = [Config, *map(reference.study_class, reference.studies())]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__module__)
def test_every_key_has_a_meaning(kind: type[Any]) -> None:
    missing = [key.key for one in sections(kind, {}) for key in one.keys if not key.meaning]
    assert not missing, "write them into the section Attributes: of the class"


def test_every_meaning_belongs_to_a_field() -> None:
    members = [x.find(name, "x") for x in families.ALL for name in x.names()]
    for kind in (*KINDS, *members):
        assert meanings(kind).keys() <= {field.name for field in dataclasses.fields(kind)}, kind


def test_the_page_is_up_to_date() -> None:
    page = numbers.ROOT / reference.PAGE
    assert page.read_text() == reference.page(), "run espalier numbers"


def test_the_keys_are_those_of_the_base_configuration() -> None:
    base = cli.read_config_file(presets.BASE).to_dict()
    keys = {key.key: key.default for one in sections(Config, base)[:1] for key in one.keys}
    for key, value in flatten(base).items():
        known = key.replace("sources.stdlib", "sources.NAME").removesuffix(".family")
        if known.split(".")[0] not in ("schedule", "optimizer") or key.endswith(".family"):
            assert to_mapping(keys[known]) == to_mapping(value), key


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inside.

    Attributes:
      width: how wide it
        is
      span: how long
    """

    width: Annotated[Tokens, FREE]
    span: Annotated[Duration, POSITIVE]


@dataclasses.dataclass(frozen=True)
class Outer:
    """Outside.

    Attributes:
      word: a choice

    No more.
    """

    word: Literal["a", "b"]
    inner: Annotated[Inner, FREE]
    several: Mapping[str, Inner]
    counts: tuple[Count, ...]


def test_a_key_is_described() -> None:
    base = {"word": "a", "inner": {"width": 3}, "several": {"x": {"width": 4}}}
    (found,) = sections(Outer, base)
    assert found.about == "Outside."
    units = "steps, tokens or percent"
    assert found.keys == [
        Key("word", "word", "", "a", "a | b", "a choice"),
        Key("inner.width", "integer", "tokens", 3, "positive", "how wide it is", is_free=True),
        Key("inner.span", "duration", units, None, "positive", "how long", is_free=True),
        Key("several.NAME.width", "integer", "tokens", 4, "positive", "how wide it is", True),
        Key("several.NAME.span", "duration", units, None, "positive", "how long"),
        Key("counts", "list of integer", "", None, "", ""),
    ]
    inside = [x.key for one in sections(Outer, base, "inner") for x in one.keys]
    assert inside == ["inner.width", "inner.span"]
    message = "  inner.width = 3\n      integer (tokens), positive: how wide it is; free\n"
    assert message in text([found])


@pytest.mark.parametrize(
    ("command", "word", "message"),
    [
        ("train", "--help_config", "  model.layers.LABEL.qk_norm = False\n"),
        ("train", "--help_config=optimizer", "optimizer.family=lion\n"),
        ("sweep", "--help_config=halving", "  halving = -\n      integer: after each length"),
    ],
)
def test_the_flag(command: str, word: str, message: str) -> None:
    line = [sys.executable, "-m", f"launch.{command}", word]
    done = subprocess.run(line, cwd=numbers.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert message in done.stdout
