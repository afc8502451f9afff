"""A step on any mesh equals the step of one device.

The meshes have eight CPU devices and run in a process of their own, since JAX fixes the number of
devices at start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.hybrids.config import BLOCK, WINDOW, patterns
from lm.families import MIXERS

ROOT = Path(__file__).resolve().parents[2]
HYBRID = {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.zero1": True,
    "mesh.stream_over_tensor": True,
    "run.accumulation": 2,
}
SEQUENCE = {"mesh.data": 2, "mesh.sequence": 2, "mesh.tensor": 2, "mesh.stream_over_tensor": True}
# In the zigzag layout a recurrence exchanges time for heads (all_to_all).
ZIGZAG = {"mesh.data": 2, "mesh.sequence": 4, "mesh.sequence_layout": "zigzag"}
SMALL = {"model.pattern": "stickbreaking,gla", "model.num_layers": 2}
TENSOR = {"mesh.tensor": 8, "mesh.replicate": ["G"]}
SLOW: dict[str, dict[str, Any]] = {
    "dp": {"mesh.data": 8},
    "zero1": {"mesh.data": 8, "mesh.zero1": True},
    "zero3": {"mesh.fsdp": 8},
    "tp": TENSOR,
    "tp+sp": TENSOR | {"mesh.stream_over_tensor": True},
    "heads whole": {"mesh.data": 2, "mesh.tensor": 4, "mesh.replicate": ["H", "G"]},
    "data x fsdp": {"mesh.data": 4, "mesh.fsdp": 2, "model.remat": "full"},
    "sequence": {"mesh.sequence": 8},
    "sequence exchanged": {"mesh.sequence": 4, "mesh.data": 2, "run.accumulation": 2}
    | {"mesh.sequence_strategy": "softmax=all_to_all, gated_deltanet=all_to_all"},
    "sequence x fsdp": {"mesh.sequence": 4, "mesh.fsdp": 2, "model.remat": "full"}
    | {"mesh.sequence_strategy": "softmax=gather,stickbreaking=gather,gla=states"},
    "zigzag exchanged": {"mesh.sequence": 4, "mesh.tensor": 2, "model.remat": "full"}
    | {"mesh.sequence_layout": "zigzag", "mesh.sequence_strategy": "all_to_all"},
    "host": {"mesh.data": 4, "mesh.tensor": 2, "mesh.zero1": True, "optimizer.memory": "host"},
}
BAD = [
    (
        {"mesh.data": 3},
        "mesh data=3, fsdp=1, tensor=1, sequence=1 needs 3 devices, found 8; set mesh.data=-1",
    ),
    ({"mesh.data": -1, "mesh.tensor": 3}, "needs a multiple of 3 devices, found 8; set sizes that"),
    ({"mesh.fsdp": 8, "model.width": 36, "mup.base_width": 36}, "has D=36, not divisible by 8"),
    ({"mesh.replicate": ["B"]}, "mesh.replicate: 'B' is not a size"),
    (
        {"mesh.sequence": 8, "data.context_length": 20},
        "data.context_length=20 does not divide into 8 pieces",
    ),
    ({"mesh.tensor": 8}, "G=4 heads are not divisible by 8 (tensor)"),
    ({"mesh.tensor": 8, "mesh.replicate": ["H"]}, "names 'H' and not 'G'"),
    ({"mesh.data": 8, "run.accumulation": 2}, "= 4 rows do not divide over data*fsdp = 8"),
    ({"mesh.data": 4, "mesh.tensor": 2, "model.ffn_dim": 47}, "F=47, not divisible by 2 (tensor)"),
    (
        {"mesh.data": 2, "mesh.tensor": 4, "mesh.stream_over_tensor": True}
        | {"data.context_length": 26},
        "splits data.context_length=26 over mesh.tensor=4",
    ),
]


def run(meshes: list[dict[str, Any]], shared: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """`shared` changes the model on every mesh, and on the single device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.lm.sharded_step", json.dumps(meshes)]
    command.append(json.dumps(shared or {}))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(name: str, found: dict[str, Any]) -> None:
    """The gradient's error is that of the worst tensor and step. The gradient norm must not depend
    on how devices share its sum.
    """
    assert found["loss"] < 1e-5, name
    assert found["norm"] < 1e-5, name
    assert found.get("gradient", 0.0) < 1e-5, name
    assert found["nll"] < 1e-4, name


def test_eight_devices_step_like_one() -> None:
    """Meshes that combine several axes equal one device. A mesh that cannot work is refused in one
    line.
    """
    meshes = [HYBRID, SEQUENCE, ZIGZAG, *(mesh for mesh, _ in BAD)]
    hybrid, sequence, zigzag, *refused = run(meshes, SMALL)
    check("hybrid", hybrid)
    check("sequence", sequence)
    check("zigzag", zigzag)
    assert 0.25 <= hybrid["bytes/params"] < 0.3
    assert 0.125 <= hybrid["bytes/optimizer"] < 0.2
    for (_, message), got in zip(BAD, refused, strict=True):
        assert message in got["error"]
        assert "\n" not in got["error"]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS.names())
def test_every_mixer_shares_the_tokens_of_a_row(mixer: str) -> None:
    """On four ranks. The short convolutions of a mixer read the tokens before their shard."""
    mesh, rows = {"mesh.data": 2, "mesh.sequence": 4}, {"mesh.data": 8}
    model = {"model.pattern": mixer, "model.num_layers": 2, "model.layers": {}}
    found, by_rows = run([mesh, rows], model)
    # One device rounds too: where only rows are split, mamba2's gradient differs from its by
    # 1.1e-5.
    assert found.pop("gradient") < max(1e-5, 1.5 * by_rows["gradient"])
    check(mixer, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(patterns(6)))
def test_every_hybrid_shares_the_tokens_of_a_row(name: str) -> None:
    """Attention and recurrences use the same layout of time."""
    layers = {"full": {"mixer": "softmax"}, "window": WINDOW | {"window": 5}}
    model: dict[str, Any] = {"model.pattern": patterns(6)[name], "model.num_layers": 6}
    model["model.layers"] = layers | {"block": BLOCK | {"block": 8}}
    found, by_rows = run([{"mesh.data": 2, "mesh.sequence": 4}, {"mesh.data": 8}], model)
    assert found.pop("gradient") < max(1e-5, 1.5 * by_rows["gradient"])
    check(name, found)


@pytest.mark.slow
def test_more_meshes_of_eight_devices_step_like_one() -> None:
    found = dict(zip(SLOW, run(list(SLOW.values())), strict=True))
    for name, got in found.items():
        check(name, got)
    assert 0.125 <= found["zero3"]["bytes/params"] < 0.15
    assert 0.125 <= found["zero3"]["bytes/optimizer"] < 0.15
    assert found["zero1"]["bytes/params"] == 1.0
    assert 0.125 <= found["zero1"]["bytes/optimizer"] < 0.15
