"""Plans for rows whose tokens devices share: what each strategy sends, keeps and waits for."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import pytest

from kernels import dispatch
from lm import plan as plan_lib
from lm import targets
from lm.build import Build
from lm.plan import Launch, changes, memory, page, search, table, time_axis, times, traffic
from lm.plan.time_axis import Split
from tests.lm import tiny

ROWS, TIME = 8, 64
SIZES = {
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.remat": "full",
    "data.context_length": TIME,
    "data.batch_size": ROWS,
    "mesh.data": 1,
}


def built(changes: dict[str, Any], devices: int = 4) -> Build:
    return tiny.create(SIZES | changes, devices)


def split(strategy: str, pattern: str = "softmax", ranks: int = 4) -> dict[str, Any]:
    named = {"mesh.sequence": ranks, "mesh.sequence_strategy": strategy}
    return named | {"model.pattern": pattern}


@pytest.mark.parametrize("name", dispatch.names())
def test_every_strategy_has_its_collectives(name: str) -> None:
    """The collectives that it declares are those that the plan counts for it, under HLO's names."""
    op = dispatch.get(name)
    case = op.cases[0]
    options = dispatch.bind_options(op, case.options, case.dims)
    for one in op.sequence:
        calls = one.sent(op, case.dims, options, 2, 4).calls
        words = {call.replace("ppermute", "collective_permute") for call in calls}
        assert {word.replace("_", "-") for word in words} == set(traffic.KINDS[one.name])


def test_a_gather_sends_keys_and_values_of_all_rows() -> None:
    """Each of four ranks receives three quarters in float32: forward, again under remat, and the
    cotangents backward.
    """
    sent = 2 * 3 * ROWS * TIME / 4 * 4 * (8 + 8) * 4.0
    expected = Split("softmax", 2, "softmax", "gather", sent, sent, sent, 2 * 6 * 1.5)
    assert time_axis.splits(built(split("gather"))) == (expected,)
    once = built(split("gather") | {"model.remat": "none"})
    assert time_axis.splits(once) == (expected._replace(again=0.0, hops=12.0),)
    halved = built(split("gather", ranks=2) | {"mesh.data": 2})
    (found,) = time_axis.splits(halved)
    assert found.forward == 2 * ROWS / 2 * TIME / 2 * 4 * (8 + 8) * 4.0


@pytest.mark.parametrize("strategy", ["states", "scan"])
def test_states_that_remat_keeps_are_not_sent_again(strategy: str) -> None:
    (anew,) = time_axis.splits(built(split(strategy, "gla")))
    named = {"model.remat": "named", "model.kept": {"states": "device"}}
    (kept,) = time_axis.splits(built(split(strategy, "gla") | named))
    assert anew.again == anew.forward
    assert kept == anew._replace(again=0.0, hops=anew.hops / 1.5)


def test_flows_are_the_strategies_and_the_gradients() -> None:
    step = built(split("gather"))
    (found,) = time_axis.splits(step)
    gradients = 4 * 2 * 3 / 4 * plan_lib.parameters(step)["by role"]["total"]
    flows = {flow.kind: flow.bytes for flow in traffic.formula(step)}
    assert flows == {
        "all-gather": found.forward + found.again,
        "reduce-scatter": found.backward,
        "all-reduce": gradients,
    }
    assert traffic.of_strategies([found], traffic.formula(step)) == found.bytes


def test_nothing_is_sent_where_time_is_whole() -> None:
    assert time_axis.splits(built({}, 1)) == ()
    assert time_axis.waiting(built({}, 1)) == 0.0


def test_activations_are_those_of_a_part_of_the_tokens() -> None:
    """With R ranks an exchange for heads keeps 1/R of everything. A gather keeps a + b / R: keys
    and values are whole, and so is what its form computes from them.
    """

    def kept(strategy: str, ranks: int) -> int:
        step = built({**split(strategy, ranks=ranks), "model.remat": "none"}, ranks)
        measured = memory.measure(step.config, jax.devices()[:ranks])
        return memory.estimate(step, measured).activations

    assert kept("all_to_all", 4) == pytest.approx(kept("all_to_all", 2) / 2, rel=0.02)
    keys = 2 * ROWS * TIME * 4 * (8 + 8) * 4
    assert 2 * kept("gather", 4) - kept("gather", 2) >= keys


def test_the_last_rank_of_contiguous_rows_is_waited_for() -> None:
    """With R ranks the last one has 2 R - 1 of R^2 parts of the causal pairs. A recurrence has
    equal work for every token.
    """
    step = built(split("gather"))
    seen = 2 * dispatch.flops("softmax", {"B": 1, "T": TIME, "H": 4, "G": 4, "K": 8, "V": 8})
    assert time_axis.waiting(step) == pytest.approx((7 / 4 - 1) * seen, rel=0.05)
    assert time_axis.waiting(built(split("all_to_all"))) == 0.0
    assert time_axis.waiting(built(split("states", "gla"))) == 0.0
    zigzag = built(split("gather") | {"mesh.sequence_layout": "zigzag"})
    assert time_axis.waiting(zigzag) == 0.0


def test_a_step_takes_longer_for_ranks_that_wait_and_messages() -> None:
    target = targets.parse("v5e-4")

    def modelled(changes: dict[str, Any]) -> times.Times:
        step = built(changes)
        measured = memory.measure(step.config, jax.devices()[:4])
        needs, flows = memory.estimate(step, measured), traffic.formula(step)
        found = times.estimate(step, target, needs, measured, flows)
        assert found is not None
        return found

    gathered = modelled(split("gather"))
    exchanged = modelled(split("all_to_all"))
    assert gathered.compute > exchanged.compute
    step = built(split("gather"))
    sending = traffic.seconds(traffic.formula(step), step.mesh, target)
    assert gathered.network == pytest.approx((sending or 0.0) + 18e-6)


@pytest.mark.slow
def test_a_long_row_that_does_not_fit_is_shared() -> None:
    """If each device has one row, sharing the row is among the proposed changes."""
    sizes = {"mesh.data": 4, "data.batch_size": 4, "data.context_length": 256}
    config = tiny.config(SIZES | sizes | {"model.remat": "none"})
    proposed = changes.proposed(config, jax.devices()[:4], 9)
    assert any(change.values.get("mesh.sequence") == 2 for change in proposed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "strategy"),
    [
        ("softmax", "gather"),
        ("softmax", "all_to_all"),
        ("gated_deltanet", "states"),
        ("gla", "scan"),
    ],
)
def test_what_is_compiled_is_what_the_strategies_say(pattern: str, strategy: str) -> None:
    step = built(split(strategy, pattern), 4)
    program = step.lowered().compile({"xla_backend_optimization_level": 0})
    compiled = traffic.compiled(program.as_text() or "", dict(step.mesh.shape))
    splits = time_axis.splits(step)
    kinds = {kind for found in splits for kind in traffic.KINDS[found.strategy]}
    for kind in kinds - {"reduce-scatter"}:  # which the CPU backend writes as an all-reduce
        formula, found = (
            sum(flow.bytes for flow in flows if flow.kind == kind)
            for flows in (traffic.formula(step), compiled)
        )
        assert formula == pytest.approx(found, rel=0.1), kind


@pytest.mark.slow
def test_a_search_shares_long_rows_by_every_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row with one head of keys and values can be split over two devices only along time."""
    monkeypatch.setattr(search, "MIN_TOKENS", TIME // 2)
    heads = {"model.num_heads": 2, "model.num_kv_heads": 1, "data.batch_size": 1}
    heads["model.pattern"] = "softmax"
    config, launch = tiny.config(SIZES | heads), Launch("--config=x.py", "run")
    target, none = targets.parse("cpu-2"), lambda message: None
    best, points = search.search(config, target, launch, none, is_compiled=False)
    assert {point.values["mesh.sequence"] for point in points} == {2}
    strategies = {point.values.get("mesh.sequence_strategy", "auto") for point in points}
    names = {one.name for one in dispatch.get("softmax").sequence}
    assert strategies == {"auto", *(f"softmax={name}" for name in names)}
    layouts = {point.values.get("mesh.sequence_layout") for point in points}
    assert layouts == {None, "contiguous", "zigzag"}
    assert "--config.mesh.sequence=2" in best.launch
    assert "softmax=gather" in search.table(points, limit=len(points))
    named = dataclasses.replace(config.mesh, sequence_strategy="gather")
    config = dataclasses.replace(config, mesh=named)
    points = search.search(config, target, launch, none, is_compiled=False)[1]
    assert not any("mesh.sequence_strategy" in point.values for point in points)


def test_a_plan_of_a_split_step_is_printed_and_written(tmp_path: Any) -> None:
    config = tiny.config(SIZES | split("", "softmax") | {"mesh.sequence_strategy": "gather"})
    launch = Launch("--config=x.py", "run")
    found = plan_lib.plan(config, targets.parse("cpu-4"), launch, is_compiled=False)
    text = table.text(found)
    assert "mesh      sequence 4" in text
    assert "along the split time axis" in text
    assert "all-gather over sequence" in text
    written = json.loads(json.dumps(plan_lib.to_json(found)))
    assert written["splits"][0]["strategy"] == "gather"
    path = tmp_path / "long.json"
    path.write_text(json.dumps(written))
    message = page.page([path])
    assert "Along the split time axis a device sends" in message
    assert "for softmax of softmax by gather" in message
