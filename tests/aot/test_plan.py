"""Formulas of lm/plan are within a tenth of the TPU compiler's account, for state and bytes sent.

The sizes and meshes are those of `launch.bench --cases=meshes`, and some that share the tokens of
rows.
"""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest

from experiments.base import get_config
from launch.benchmarks import meshes
from launch.benchmarks.meshes import SIZES
from lm import extras, targets
from lm import plan as plan_lib
from lm.config import Config
from lm.plan import Launch, Plan, explain
from lm.targets import Target
from tests.lm import tiny

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason=f"libtpu is not installed: {extras.command('aot')}",
    ),
]

SPLIT = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.sequence": 4}
MODES = meshes.MODES | {
    "exchanged": {"mesh.data": 2, "mesh.sequence": 4, "mesh.sequence_strategy": "all_to_all"},
    "gathered": SPLIT | {"mesh.sequence_strategy": "gather"},
    "states": SPLIT | {"mesh.sequence_strategy": "states", "model.pattern": "gla"},
}


@functools.cache
def planned(mode: str) -> Plan:
    return meshes.planned(get_config().to_dict(), MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_state_is_within_a_tenth(mode: str) -> None:
    found = planned(mode)
    assert found.program is not None
    assert found.fits
    assert found.memory.state == pytest.approx(found.program.state, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_sent_are_within_a_tenth(mode: str) -> None:
    found = planned(mode)
    assert found.program is not None
    axes = {axis for flow in found.flows for axis in flow.axes}
    for axis in axes:
        sent = {
            name: sum(flow.bytes for flow in flows if axis in flow.axes)
            for name, flows in (("formula", found.flows), ("compiled", found.program.flows))
        }
        assert sent["formula"] == pytest.approx(sent["compiled"], rel=0.1), (mode, axis, sent)


def test_forms_of_the_target_and_what_was_substituted() -> None:
    """A kernel is chosen if it is known to win on a v5e. The plan names an op that has no
    kernel.
    """
    (form,) = planned("dp").forms
    assert form.form == "pallas_tpu"
    assert form.reason.startswith("modelled on TPU v5 lite over chunked: forward")
    assert not form.substituted
    config = tiny.config({"model.pattern": "s4d", "mesh.data": 8, "data.batch_size": 8})
    launch = Launch("--config=x.py", "run")
    found = plan_lib.plan(config, targets.parse("v5e-8"), launch, is_compiled=False)
    assert {f.substituted for f in found.forms} == {"linear_scan has no pallas_tpu yet"}


@pytest.mark.parametrize("name", ["v5e-8", "h100-8"])
def test_formulas_say_the_same_of_devices_and_stand_ins(name: str) -> None:
    target = targets.parse(name)
    config = tiny.config({"mesh.data": 2, "mesh.fsdp": 4, "data.batch_size": 8})
    assert type(targets.devices(target)[0]) is not targets.StandIn
    plain = [plan_lib.to_json(_formulas(config, target, here)) for here in (True, False)]
    assert plain[0] == plain[1]


def _formulas(config: Config, target: Target, is_here: bool) -> Plan:
    devices = targets.devices(target, is_compiled=is_here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "devices", lambda target, **how: devices)
        return plan_lib.plan(config, target, Launch("--config=x.py", "run"), is_compiled=False)


def test_a_step_that_does_not_fit_is_explained_and_mended() -> None:
    """Four thousand rows do not fit on four chips. The remedy is compiled, and fits."""
    sizes = SIZES | {"data.batch_size": 4096, "model.remat": "none", "mesh.data": 4}
    config, target = tiny.config(sizes), targets.parse("v5e-4")
    found = plan_lib.plan(config, target, Launch("--config=x.py", "run"))
    assert found.fits is False
    assert found.program is not None
    assert "RESOURCE_EXHAUSTED" in found.program.refusal
    assert found.mended is not None
    assert not found.mended.refusal
    assert (found.mended.total or 0) < (target.chip.usable_bytes or 0)
    text = explain.explain(config, targets.devices(target), found.program.refusal)
    assert text.count("--config.") >= 3


GPU_PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
    "jax_plugins.xla_cuda13"
)


@pytest.mark.skipif(not GPU_PLUGIN, reason="jax-cuda13-plugin is not installed")
def test_an_h100_step_compiles_and_is_held_against_the_budget() -> None:
    config = tiny.config(SIZES | {"mesh.data": 1, "mesh.fsdp": 8})
    found = plan_lib.plan(config, targets.parse("h100-8"), Launch("--config=x.py", "run"))
    assert found.program is not None
    assert found.fits
    assert found.memory.state == pytest.approx(found.program.state, rel=0.1)
    json.dumps(plan_lib.to_json(found))
