"""What `build` puts together: shardings, initial parameters, FLOPs; a step on four devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm import build as build_lib
from lm import params as params_lib
from lm.config import UserError
from tests.lm import tiny

ROOT = Path(__file__).resolve().parents[2]
MESHES: list[dict[str, Any]] = [
    {"mesh.fsdp": 2, "mesh.tensor": 2, "run.accumulation": 2},
]
SLOW_MESHES: list[dict[str, Any]] = [
    {"mesh.data": 2, "mesh.fsdp": 2},
    {"mesh.data": 4},
    {"mesh.fsdp": 4},
    {"mesh.data": 2, "mesh.tensor": 2},
    {"mesh.tensor": 4, "mesh.replicate": ["H", "G"]},
]
BAD_MESHES = [
    ({"mesh.data": 3}, "needs 3 devices or a multiple, found 4; set mesh.data=-1"),
    ({"mesh.data": 2, "mesh.sequence": 2}, "mesh.sequence=2: no op shards the time axis yet"),
    ({"mesh.tensor": 4}, "G=2 heads are not divisible by 4 (tensor)"),
    ({"mesh.tensor": 4, "mesh.replicate": ["G"]}, "names one of 'H' and 'G'"),
    ({"mesh.data": 4, "run.accumulation": 2}, "= 2 rows do not divide over data*fsdp = 4"),
    ({"mesh.data": 2, "mesh.tensor": 2, "model.ffn_dim": 47}, "F=47, not divisible by 2 (tensor)"),
]


def run_on_four_devices(meshes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Other tests want one device, and the number is fixed once JAX has started."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-m", "tests.lm.sharded_step", json.dumps(meshes)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check_equal(found: dict[str, Any]) -> None:
    assert found["sharded"] > 0 or found["mesh"].get("mesh.data") == 4
    assert found["updates"] < 1e-4
    assert found["metrics"] < 1e-5
    assert found["nll"] < 1e-4


def test_four_devices_step_like_one() -> None:
    found = run_on_four_devices(MESHES + [mesh for mesh, _ in BAD_MESHES])
    for mesh, got in zip(MESHES, found[: len(MESHES)], strict=True):
        check_equal(got | {"mesh": mesh})
    for (_, message), got in zip(BAD_MESHES, found[len(MESHES) :], strict=True):
        assert message in got["error"]
        assert "\n" not in got["error"]


@pytest.mark.slow
def test_more_meshes_of_four_devices_step_like_one() -> None:
    for mesh, got in zip(SLOW_MESHES, run_on_four_devices(SLOW_MESHES), strict=True):
        check_equal(got | {"mesh": mesh})


@functools.cache
def initial(parametrization: str, tied: bool) -> tuple[Any, Any]:
    """(parameters, infos) of a model of twice the base width."""
    one = {"mup.embedding_multiplier": 1.0, "mup.residual_multiplier": 1.0}
    built = tiny.create(
        {
            "model.width": 128,
            "model.ffn_dim": 256,
            "mup.base_width": 64,
            "model.tied_embeddings": tied,
            "mup.parametrization": parametrization,
        }
        | (one if parametrization == "standard" else {})
    )
    return jax.device_get(built.init(3).params), built.infos


def deviations(params: Any, infos: Any) -> dict[str, list[float]]:
    """role -> standard deviation of each matrix of at least 8,192 elements."""
    found: dict[str, list[float]] = {}
    leaves = jax.tree.leaves(infos, is_leaf=params_lib.is_info)
    for x, info in zip(jax.tree.leaves(params), leaves, strict=True):
        if x.size >= 8192:
            found.setdefault(info.role, []).append(float(np.std(x)))
            assert abs(np.mean(x)) < 4 * np.std(x) / np.sqrt(x.size)
    return found


@pytest.mark.parametrize(
    ("parametrization", "hidden"), [("mup", 0.1 / np.sqrt(2)), ("standard", 0.1)]
)
def test_initial_standard_deviations_by_role(parametrization: str, hidden: float) -> None:
    """Within 2 %: at 32,768 elements the standard error is 0.4 %."""
    params, infos = initial(parametrization, False)
    found = deviations(params, infos)
    assert set(found) == {"input", "hidden", "output"}
    large = [
        float(np.std(params["groups_0"]["blocks_0"]["mlp"][n]["kernel"])) for n in ("up", "down")
    ]
    for std, expected in [(s, hidden) for s in large] + [
        (s, 0.1) for role in ("input", "output") for s in found[role]
    ]:
        assert std == pytest.approx(expected, rel=0.02)
    assert np.all(params["final_norm"]["scale"] == 1)


def test_initial_matrices_differ_from_each_other() -> None:
    params, _ = initial("mup", False)
    mlp = params["groups_0"]["blocks_0"]["mlp"]
    assert (
        np.abs(np.corrcoef(mlp["up"]["kernel"].ravel(), mlp["gate"]["kernel"].ravel())[0, 1]) < 0.03
    )
    assert not np.array_equal(params["embed"]["table"], params["output"]["table"])


def test_state_is_float32_and_starts_at_step_0() -> None:
    built = tiny.create({"model.precision": "bfloat16"})
    abstract = built.abstract_state
    assert {x.dtype for x in jax.tree.leaves(abstract.params)} == {np.dtype("float32")}
    assert abstract.step.dtype == np.dtype("int32")
    assert built.abstract_batch.tokens.shape == (4, 24)
    assert built.abstract_token_bytes.shape == (tiny.VOCAB,)


@pytest.mark.parametrize(("tied", "pattern"), [(True, "softmax"), (False, "stickbreaking")])
def test_flops_per_token(tied: bool, pattern: str) -> None:
    """Six per parameter of a matmul (the head once, tied or not), and causal pairs of attention."""
    built = tiny.create({"model.tied_embeddings": tied, "model.pattern": pattern})
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    pairs = 24 * 25 / 2 if pattern == "softmax" else 24 * 23 / 2
    attention = 2 * 4 * (8 + 8) * pairs / 24
    expected = 3 * (2 * (layer + 384 * 32) + attention)
    assert build_lib.flops_per_token(built) == pytest.approx(expected)


def test_parameter_table_and_counts() -> None:
    infos = tiny.create().infos
    text = params_lib.table(infos)
    assert "embed/table" in text
    assert f"{params_lib.count(infos)['total']:,}" in text.splitlines()[-1]


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"is not a multiple of run\.accumulation=3"):
        tiny.config({"run.accumulation": 3})
