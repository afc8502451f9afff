"""What a run takes over of the checkpoint it starts from, one thing at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from lm.families import Family
from lm.mapping import UserError
from lm.optimizers.adamw import Adamw
from lm.run import checkpoint, origin
from lm.run.checkpoint import Restored
from lm.state import TrainState


def state(value: str) -> TrainState:
    return TrainState(**{name: f"{value} {name}" for name in TrainState._fields})  # pyright: ignore


class Started(NamedTuple):
    """What `begin` asks of a build, a saver and a loader."""

    abstract_state: Any = None
    config: Any = SimpleNamespace(seed=0)
    identity: str = "data"

    def init(self, seed: int) -> TrainState:
        return state("new")

    def restore_latest(self, abstract: Any) -> None:
        return None

    def set_state(self, places: Any) -> None:
        raise AssertionError("the stream begins anew")


def test_a_run_begins_with_what_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Restored(state("old"), {"identity": "data"}, {}, cast(Any, None))
    monkeypatch.setattr(checkpoint, "restore", lambda folder, abstract: found)
    carried = origin.NOTHING._replace(params=True, moments=True)
    given = origin.Origin(Path("runs/a/checkpoints/1"), carried, None, cast(Any, None))
    made: Any = origin.begin(given, *[cast(Any, Started())] * 3)
    assert (made.params, made.opt_state, made.step) == ("old params", "old opt_state", "new step")


def test_moments_are_of_one_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace(optimizer=Adamw())
    monkeypatch.setattr(checkpoint, "read_config", lambda folder: theirs)
    monkeypatch.setattr(Family, "name_of", lambda family, kind: kind.__name__.lower())
    ours = cast(Any, SimpleNamespace(optimizer=SimpleNamespace()))
    told = r"optimizer.family='adamw', this run has 'simplenamespace'; set it to 'adamw'"
    with pytest.raises(UserError, match=told):
        origin._check_optimizer(ours, Path("runs/a/checkpoints/1"))


@pytest.mark.parametrize(
    ("carried", "old"),
    [
        (origin.NOTHING, set()),
        (origin.WEIGHTS, {"params"}),
        (origin.NOTHING._replace(moments=True), {"opt_state"}),
        (origin.RESUMED._replace(moments=False), set(TrainState._fields) - {"opt_state"}),
        (origin.NOTHING._replace(step=True), set(TrainState._fields) - {"opt_state", "params"}),
        (origin.DECAY, set(TrainState._fields)),
    ],
    ids=["nothing", "weights", "moments", "all but moments", "step", "decay"],
)
def test_what_is_carried_and_nothing_else(carried: origin.Carried, old: set[str]) -> None:
    made = origin.carry(carried, state("old"), state("new"))
    assert {name for name in TrainState._fields if getattr(made, name) == f"old {name}"} == old
    assert {name for name in TrainState._fields if getattr(made, name) == f"new {name}"} == (
        set(TrainState._fields) - old
    )
