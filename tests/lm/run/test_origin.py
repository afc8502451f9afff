"""What a run takes over of the checkpoint it starts from, one thing at a time."""

from __future__ import annotations

import pytest

from lm.run import origin
from lm.state import TrainState


def state(value: str) -> TrainState:
    return TrainState(**{name: f"{value} {name}" for name in TrainState._fields})  # pyright: ignore


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
