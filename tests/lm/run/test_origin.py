"""What a run takes from the checkpoint it starts from, one thing at a time."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from lm import schedules
from lm.families import SCHEDULES, Family
from lm.mapping import UserError
from lm.optimizers.adamw import Adamw
from lm.run import checkpoint, formats, origin
from lm.run.checkpoint import Restored
from lm.run.items import Meta
from lm.state import TrainState
from tests.lm import tiny
from tests.lm.lab import DECAY_START, STEPS, Lab, assert_equal_runs, copy, meta


def state(value: str) -> TrainState:
    return TrainState(**{name: f"{value} {name}" for name in TrainState._fields})  # pyright: ignore


class Started(NamedTuple):
    """What `begin` needs from a build, a saver and a loader."""

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
    made: Any = origin.begin(given, *[cast(Any, Started())] * 3).state
    assert (made.params, made.opt_state, made.step) == ("old params", "old opt_state", "new step")


def test_moments_of_another_optimizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace(optimizer=Adamw())
    monkeypatch.setattr(checkpoint, "read_config", lambda folder: theirs)
    monkeypatch.setattr(Family, "name_of", lambda family, kind: kind.__name__.lower())
    ours = cast(Any, SimpleNamespace(optimizer=SimpleNamespace()))
    message = r"optimizer.family='adamw', this run has 'simplenamespace'; set it to 'adamw'"
    with pytest.raises(UserError, match=message):
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


PER_STEP = 96
# schedule, old steps, new steps, step of the weights -> step to go back to; None: the run goes on
PLANS: list[tuple[dict[str, Any], int, int, int, int | None]] = [
    ({"family": "wsd", "decay": "25 percent"}, 40, 80, 30, None),
    (
        {"family": "wsd", "decay": "25 percent"},
        40,
        80,
        31,
        None,
    ),  # updated at the full rate
    ({"family": "wsd", "decay": "25 percent"}, 40, 80, 32, 31),
    ({"family": "wsd", "decay": "25 percent"}, 40, 80, 40, 31),
    ({"family": "wsd", "decay": "25 percent"}, 40, 33, 30, 20),  # shortened into its decay
    ({"family": "wsd", "decay": "25 percent"}, 40, 33, 40, None),  # another check refuses it
    ({"family": "wsd", "decay": "25 percent"}, 40, 40, 35, None),
    ({"family": "wsd", "decay": "0 percent"}, 40, 80, 40, None),
    ({"family": "wsd", "decay": "25 percent", "final_ratio": 1.0}, 40, 80, 40, None),
    ({"family": "power", "decay": "10 steps"}, 40, 80, 40, 31),
    ({"family": "power", "decay": "10 steps"}, 40, 80, 20, None),
    ({"family": "cosine", "warmup": "10 steps"}, 40, 80, 20, 10),
    ({"family": "cosine", "warmup": "10 steps"}, 40, 80, 10, None),
    ({"family": "cosine", "warmup": "10 steps", "horizon": "60 steps"}, 40, 80, 40, None),
]


@pytest.mark.parametrize(("schedule", "old", "new", "step", "back"), PLANS, ids=str)
def test_a_run_can_only_be_lengthened_before_its_decay(
    tmp_path: Path, schedule: dict[str, Any], old: int, new: int, step: int, back: int | None
) -> None:
    planned, config = (
        tiny.config({"schedule": {"warmup": "4 steps"} | schedule, "run.length": f"{n} steps"})
        for n in (old, new)
    )
    folder = tmp_path / checkpoint.FOLDER
    for kept in (10, 20, 30, 31, step):
        (folder / str(kept)).mkdir(parents=True, exist_ok=True)
    written = Meta(step, step * PER_STEP, None, {}, {})
    restored = Restored(cast(Any, None), {}, formats.write(planned), written)
    run = schedules.Run(config.run_tokens, PER_STEP)
    planned_anew = {"schedule": config.schedule.schedule(run), "run_tokens": config.run_tokens}
    built = cast(Any, SimpleNamespace(config=config, **planned_anew))
    if back is None:
        origin._check_length(restored, built, folder)
        return
    with pytest.raises(UserError) as caught:
        origin._check_length(restored, built, folder)
    message = f"run.length={new} steps in place of {old} steps moves the decay"
    assert str(caught.value).startswith(message)
    assert f"; to go on from {folder / str(back)}, move what came after" in str(caught.value)


def test_every_schedule_says_where_its_decay_begins() -> None:
    """Two plans agree until that step, so a run may become a longer one there."""
    for name in SCHEDULES.names():
        known = SCHEDULES.defaults(name, "schedule")
        lengths = {key: "10 steps" for key in ("warmup", "cooldown") if key in known}
        changes = {"schedule": {"family": name, **lengths}, "run.length": "40 steps"}
        rule = tiny.config(changes).schedule
        short, long = (rule.schedule(schedules.Run(n * PER_STEP, PER_STEP)) for n in (40, 80))
        last = short.last_before_decay(lambda tokens: tokens / PER_STEP)
        if last is None:
            continue
        rates = [[float(s(PER_STEP * i)) for i in range(last + 3)] for s in (short, long)]
        assert rates[0][:last] == rates[1][:last], name
        assert rates[0][last + 2] != rates[1][last + 2], name


def command(line: str) -> str:
    """The command in a message."""
    found = re.search(r"away: (mkdir .*)$", line)
    assert found, line
    return found[1]


def test_a_finished_run_is_lengthened_from_where_its_decay_began(lab: Lab, tmp_path: Path) -> None:
    """The checkpoint at the start of the decay is always kept. The message's command works, and the
    result equals the longer run bit for bit.
    """
    few = {"checkpoint.every": "5 steps", "checkpoint.keep_last": 1}
    longer = few | {"run.length": f"{2 * STEPS} steps"}
    workdir = tmp_path / "a run"
    lab.run(workdir, few)
    assert checkpoint.steps(workdir) == [DECAY_START, STEPS]
    with pytest.raises(UserError, match="have decayed or would be in it") as caught:
        lab.run(workdir, longer)
    subprocess.run(command(str(caught.value)), shell=True, check=True)
    assert lab.run(workdir, longer).finished
    assert_equal_runs(workdir, lab.longer)


def test_a_decay_branches_from_weights_that_have_not_decayed(lab: Lab, tmp_path: Path) -> None:
    changes = {"decay_from": str(lab.whole)}
    with pytest.raises(UserError, match=f"has decayed already, since step {DECAY_START}") as caught:
        lab.run(tmp_path / "run", changes)
    named = str(caught.value).partition("; set decay_from to ")[2]
    assert named == str(lab.whole / "checkpoints" / str(DECAY_START))
    assert not (tmp_path / "run").exists()
    assert lab.run(tmp_path / "run", {"decay_from": named}).finished
    assert meta(tmp_path / "run").digest == meta(lab.whole).digest
    branch = copy(tmp_path / "run", tmp_path / "branch")
    with pytest.raises(UserError, match="since step 9 of its run; none from before it is kept"):
        lab.run(tmp_path / "twice", {"decay_from": str(branch)})
