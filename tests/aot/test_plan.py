"""Formulas of lm/plan beside the TPU compiler's account: state, and bytes sent, within a tenth.

The width is such that a device's part of it fills the 128 lanes of a TPU even after eight ways: a
smaller part is padded, and its gradient reduced whole.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from typing import Any

import pytest

from lm import plan as plan_lib
from lm import targets
from lm.plan import Launch, Plan, explain
from tests.lm import tiny

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'espalier[aot]'",
    ),
]

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
    "mup.base_width": 256,
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
    "tp": {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4},
    "tp+sp": {"mesh.data": 2, "mesh.tensor": 4, "mesh.sequence_parallel": True},
}


@functools.cache
def planned(mode: str) -> Plan:
    config = tiny.config(SIZES | MODES[mode])
    return plan_lib.plan(config, targets.parse("v5e-8"), Launch("--config=x.py", "run"))


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


def test_what_was_substituted_is_said() -> None:
    (form,) = planned("dp").forms
    assert form.form == "chunked"
    assert form.substituted == "stickbreaking has no pallas_tpu yet"


def test_a_step_that_does_not_fit_is_explained_and_mended() -> None:
    """Four thousand rows on four chips; the remedy is compiled and fits."""
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
