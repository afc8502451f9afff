"""The formulas of `espalier plan` against the TPU compiler, on eight absent chips.

For every way to split a step: bytes of state, and bytes sent; and how the state shrinks with the
ranks of ZeRO-3. A value is a distance, |formula / compiler - 1|. An eighth of the width still fills
the 128 lanes of a TPU: a smaller part would be padded, and its gradient reduced whole. Needs the
extra `aot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm import plan, targets
from lm.config import Config, from_mapping
from lm.plan import Launch, Plan
from lm.plan.changes import apply

TARGET = "v5e-8"
GOAL = Goal("<=", 0.1)
SIZES: dict[str, Any] = {
    "model.pattern": "stickbreaking",
    "model.width": 1024,
    "model.num_layers": 2,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.head_dim": 128,
    "model.ffn_dim": 1024,
    "model.precision": "bfloat16",
    "model.remat": "full",
    "mup.base_width": 256.0,
    "data.tokenizer.vocab_size": 2048,
    "data.context_length": 256,
    "data.batch_size": 16,
    "loss.chunk_size": 512,
}
MODES: dict[str, dict[str, Any]] = {
    "dp": {"mesh.data": 8},
    "dp, accumulated": {"mesh.data": 8, "run.accumulation": 2},
    "zero1": {"mesh.data": 8, "mesh.zero1": True},
    "zero3": {"mesh.data": 1, "mesh.fsdp": 8},
    "hybrid": {"mesh.data": 2, "mesh.fsdp": 4},
    "zero1 x fsdp": {"mesh.data": 2, "mesh.fsdp": 4, "mesh.zero1": True},
    "zero1 x tp": {"mesh.data": 2, "mesh.tensor": 4, "mesh.zero1": True},
    "tp": {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4},
    "tp+sp": {"mesh.data": 2, "mesh.tensor": 4, "mesh.stream_over_tensor": True},
}
RANKS = (1, 2, 4, 8)


def run(options: Options) -> list[Result]:
    found = {name: planned(options.base, changes) for name, changes in MODES.items()}
    results = [result for name, plan in found.items() for result in _distances(name, plan)]
    states = []
    for ranks in RANKS:
        mesh = {"mesh.data": RANKS[-1] // ranks, "mesh.fsdp": ranks}
        states.append(_program(planned(options.base, mesh)).state)
    worst = max(abs(state * n / states[0] - 1.0) for state, n in zip(states, RANKS, strict=True))
    facts = {"ranks": list(RANKS), "state_bytes": states}
    name = "meshes/zero3/state times ranks"
    return [*results, Result(name=name, value=worst, goal=GOAL, facts=facts)]


def planned(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Plan:
    """The plan of the small step of SIZES; `changes` maps dotted keys to values."""
    return plan.plan(config(base, changes), targets.parse(TARGET), Launch("", ""))


def config(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    return apply(from_mapping(base), SIZES | dict(changes))


def _distances(name: str, found: Plan) -> list[Result]:
    program = _program(found)
    account = {
        "parameters": found.memory.parameters,
        "optimizer": found.memory.optimizer,
        "compiled": program.state,
    }
    results = [_distance(f"meshes/{name}/state", found.memory.state, program.state, account)]
    flows = {
        "formula": [flow._asdict() for flow in found.flows],
        "compiled": [flow._asdict() for flow in program.flows],
    }
    for axis in sorted({axis for flow in found.flows for axis in flow.axes}):
        formula, compiled = (
            sum(flow.bytes for flow in some if axis in flow.axes)
            for some in (found.flows, program.flows)
        )
        title = f"meshes/{name}/bytes sent over {axis}"
        results.append(_distance(title, formula, compiled, {key: flows[key] for key in flows}))
    return results


def _distance(name: str, formula: float, compiled: float, facts: dict[str, Any]) -> Result:
    numbers = {"formula_bytes": formula, "compiled_bytes": compiled}
    value = abs(formula / compiled - 1.0)
    return Result(name=name, value=value, goal=GOAL, facts=numbers | {"of": facts})


def _program(found: Plan) -> Any:
    assert found.program is not None
    return found.program
