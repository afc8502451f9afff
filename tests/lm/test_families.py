"""Members of families by name: found, converted, completed, refused, and written out again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Annotated, Any, ClassVar

import pytest
from ml_collections import ConfigDict

from lm import families, layers
from lm.config import from_mapping, to_mapping
from lm.families import MIXERS, SCHEDULES, Choice, Family
from lm.feed_forward.swiglu import Swiglu
from lm.mapping import (
    FREE,
    POSITIVE,
    Duration,
    Later,
    Unit,
    UserError,
    convert,
    field_marks,
    free_keys,
)
from lm.mixers.retnet import Retnet
from lm.modules.mixer import Call
from lm.optimizers.adamw import Adamw
from lm.schedules.wsd import Wsd
from tests.lm import tiny


def test_a_name_or_a_mapping_becomes_the_member_with_every_option() -> None:
    made = SCHEDULES.create({"family": "wsd", "decay": "10 percent"}, "schedule")
    assert made == Wsd(decay=Duration(10, "percent"))
    assert SCHEDULES.create("wsd", "schedule") == Wsd()
    written = SCHEDULES.to_mapping(made)
    assert written == {"family": "wsd"} | to_mapping(made)
    assert written["warmup"] == "100000 tokens"
    assert SCHEDULES.create(written, "schedule") == made


def test_a_flax_module_stays_a_choice_until_there_is_a_model() -> None:
    chosen = families.FEED_FORWARDS.choose({"family": "swiglu", "ffn_dim": 8}, "model.mlp")
    assert chosen == Choice("swiglu", {"ffn_dim": 8})
    assert families.FEED_FORWARDS.to_mapping(chosen) == {"family": "swiglu", "ffn_dim": 8}


@pytest.mark.parametrize("family", families.ALL, ids=lambda family: family.folder)
def test_every_file_of_every_family_holds_its_class(family: Family) -> None:
    assert family.names()
    for name in family.names():
        member = family.find(name, "here")
        assert family.name_of(member) == name
        assert callable(member.problem)


@pytest.mark.parametrize("family", families.ALL, ids=lambda family: family.folder)
def test_an_option_that_came_later_has_as_default_what_came_before(family: Family) -> None:
    for name in family.names():
        member = family.find(name, "here")
        defaults = {field.name: field.default for field in dataclasses.fields(member)}
        for key, marks in field_marks(member).items():
            for mark in marks:
                assert not isinstance(mark, Later) or defaults[key] == mark.neutral, (name, key)


class Wide(Swiglu):
    """A feed-forward with an option that was added later."""

    rank: Annotated[int, Later(0)] = 0


def test_an_option_of_a_flax_module_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.FEED_FORWARDS
    monkeypatch.setattr(Family, "find", lambda *_: Wide)
    before, now = ({"family": "swiglu", "ffn_dim": 8} | more for more in ({}, {"rank": 2}))
    assert family.to_mapping(family.choose(before, "mlp")) == before
    assert family.to_mapping(family.choose(now, "mlp")) == now
    assert family.defaults("swiglu", "mlp")["rank"] == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"family": "wsdd"}, "schedule: unknown schedule 'wsdd'; did you mean 'wsd'?"),
        ({"family": 3}, "schedule: unknown schedule 3; known: "),
        ({"decay": "1 steps"}, "name a schedule, {'family': NAME, ...}"),
        (None, "schedule=None: name a schedule"),
        ({"family": "wsd", "decy": 3}, "unknown option schedule.decy; did you mean 'decay'?"),
        ({"family": "wsd", "decay": 3}, "schedule.decay=3 is a int; set a str"),
        ({"family": "wsd", "peak_learning_rate": 0}, "peak_learning_rate=0.0 must be positive"),
        ({"family": "power", "a": -1.0}, "schedule: a=-1.0, b=-0.51: Power needs a > 0"),
    ],
)
def test_mistakes(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        SCHEDULES.create(value, "schedule")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_installed_member_may_not_take_the_name_of_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = importlib.metadata.EntryPoint("wsd", "elsewhere:Wsd", "espalier.schedules")
    monkeypatch.setattr(families, "_entry_points", lambda group: {"wsd": point})
    with pytest.raises(UserError, match=r"elsewhere:Wsd .* rename its entry point"):
        SCHEDULES.create("wsd", "schedule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncallable:
    is_causal: ClassVar[bool] = True

    def problem(self) -> str | None:
        return None


def test_an_objective_that_cannot_be_called_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class itself is callable, so a test for `__call__` on the class finds it even if instances
    have none.
    """
    point = importlib.metadata.EntryPoint("none", f"{__name__}:Uncallable", "espalier.objectives")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda _: Uncallable)
    monkeypatch.setattr(families, "_entry_points", lambda group: {"none": point})
    with pytest.raises(UserError, match=r"Uncallable has no '__call__'"):
        families.OBJECTIVES.create("none", "objective")


def test_a_member_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("saw", "absent_package:Saw", "espalier.schedules")
    monkeypatch.setattr(families, "_entry_points", lambda group: {"saw": point})
    with pytest.raises(UserError, match=r"absent_package:Saw .* cannot be imported"):
        SCHEDULES.create("saw", "schedule")


def test_two_installed_members_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "espalier.two"
    points = [importlib.metadata.EntryPoint("saw", f"{x}:Saw", group) for x in ("a", "b")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    with pytest.raises(UserError, match=r"two installed packages name 'saw' .* a:Saw and b:Saw"):
        Family("two", "two")._installed()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuples(Wsd):
    points: tuple[float, ...] = (1, 2)
    speed: float = 1
    period: Annotated[Duration, POSITIVE] = Duration(3, "steps")


class Undecorated(Wsd):
    speed: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(Wsd):
    family: str = "x"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Without(Wsd):
    speed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maybe(Wsd):
    speed: float | None = None


@dataclasses.dataclass(frozen=True)
class Bare:
    speed: float = 1.0


def installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    point = importlib.metadata.EntryPoint("saw", f"{__name__}:{name}", "espalier.schedules")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda _: globals()[name])
    monkeypatch.setattr(families, "_entry_points", lambda group: {"saw": point})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Undecorated", "'speed' is not a field; write @dataclasses.dataclass"),
        ("Named", "an option cannot be named 'family'"),
        ("Without", "the option 'speed' has no default"),
        ("Maybe", "the option 'speed' has no default"),
        ("Bare", "has no 'problem'"),
    ],
)
def test_a_mistake_in_the_file_of_a_member_is_reported(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, name)
    with pytest.raises(UserError) as caught:
        SCHEDULES.create("saw", "schedule")
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_are_as_annotated_and_a_flag_can_override_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, "Tuples")
    defaults = SCHEDULES.defaults("saw", "schedule")
    assert defaults["points"] == (1.0, 2.0)
    assert isinstance(defaults["speed"], float)
    assert ConfigDict(defaults).points == (1.0, 2.0)
    with pytest.raises(UserError, match=r"schedule.period=0 steps must be positive"):
        SCHEDULES.create({"family": "saw", "period": "0 steps"}, "schedule")


def test_marks_say_what_a_number_must_be_and_what_it_counts() -> None:
    kind = Annotated[int, Unit("tokens"), POSITIVE]
    assert convert(kind, 3, "x") == 3
    with pytest.raises(UserError, match=r"^x=0 tokens must be positive$"):
        convert(kind, 0, "x")


def test_options_are_described_with_defaults_and_bounds() -> None:
    described = SCHEDULES.describe("power", "schedule")
    assert described["peak_learning_rate"] == "0.02, must be positive"
    assert described["warmup"] == "100000 tokens"
    assert families.FEED_FORWARDS.describe("swiglu", "mlp") == {
        "ffn_dim": "the model's, must be positive"
    }


def test_free_keys_are_those_of_the_chosen_member() -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        a: Annotated[int, FREE]
        b: int

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Any
        c: Annotated[int, FREE]

    assert free_keys(Outer(Inner(1, 2), 3)) == ("inner.a", "c")
    found = free_keys(tiny.config())
    assert "optimizer.memory" in found
    assert {"mesh", "run.length", "run.accumulation", "model.remat"} <= set(found)
    assert not {"optimizer", "schedule", "model", "data", "seed"} & set(found)


class Cheap(Swiglu):
    """A feed-forward with an option that does not change results."""

    is_logged: Annotated[bool, FREE] = False


def test_free_options_of_a_flax_module(monkeypatch: pytest.MonkeyPatch) -> None:
    find = Family.find
    swapped = lambda family, name, where: (
        Cheap if family is families.FEED_FORWARDS else find(family, name, where)
    )
    monkeypatch.setattr(Family, "find", swapped)
    assert "model.mlp.is_logged" in free_keys(tiny.config())


def test_the_configuration_holds_members_and_writes_every_option() -> None:
    config = tiny.config({"optimizer": {"family": "adamw", "beta1": 0.8}})
    assert config.optimizer == Adamw(beta1=0.8)
    written = to_mapping(config)
    assert written["optimizer"]["beta2"] == 0.95
    assert from_mapping(written) == config


class Twice(Retnet):
    """A mixer that calls a second op, but has no field for that op's form."""

    op: ClassVar[str] = "gated_linear"

    def calls(self) -> dict[str, Call]:
        main = super().calls()["main"]
        return {"main": main, "again": main}


def test_a_call_without_a_field_for_its_form_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = Family.find
    swapped = lambda family, name, where: Twice if family is MIXERS else find(family, name, where)
    monkeypatch.setattr(Family, "find", swapped)
    with pytest.raises(UserError, match=r"Twice calls an op 'again' and has no field 'again_form'"):
        layers.check(tiny.config({"model.pattern": "retnet"}).model)
