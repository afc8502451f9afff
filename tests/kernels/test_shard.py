"""Ops on a mesh equal one device. A mismatch is an error that names both values."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels import dispatch, shard

ROOT = Path(__file__).parents[2]


def run_program(*arguments: str) -> set[tuple[str, ...]]:
    """(op, form) of what passed, in its own process, because JAX fixes its devices at start."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "TRITON_INTERPRET": "1"}
    settings |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.sharded_program", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {tuple(line.split()) for line in done.stdout.splitlines()}


def test_sharded_equals_unsharded():
    assert run_program() == {(name, "chunked") for name in dispatch.names()}


@pytest.mark.slow
def test_sharded_equals_unsharded_in_every_form():
    forms = {(name, form) for name in dispatch.names() for form in dispatch.get(name).forms}
    assert run_program("everything") == forms


def test_letters_become_specs():
    rules = {"B": ("data", "fsdp"), "H": ("tensor",), "G": ("tensor",)}
    spec = PartitionSpec(("data", "fsdp"), None, ("tensor",), None)
    assert shard.spec("B T H K", rules) == spec


@pytest.mark.parametrize(
    ("dims", "rules", "message"),
    [
        ({"B": 3, "H": 4, "G": 4}, {"B": ("data",)}, "B=3 must be a multiple of 2"),
        ({"B": 4, "T": 7, "H": 4, "G": 4}, {"T": ("data",)}, "T=7 must be a multiple of 2"),
        ({"B": 4, "H": 4, "G": 4, "K": 8}, {"K": ("data",)}, "softmax cannot split K"),
        ({"B": 4, "H": 4, "G": 4}, {"B": ("row",)}, "'row'"),
        ({"B": 4, "H": 4, "G": 2}, {"G": ("data",)}, "set both alike or leave G whole"),
        ({"B": 4, "H": 6, "G": 3}, {"H": ("data",)}, "G=3 heads, whole on 2 shards"),
    ],
)
def test_misfits_are_errors(dims: dict[str, int], rules: shard.Rules, message: str):
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    place = shard.Placement(cast(Any, mesh), rules, "auto", "contiguous")
    with pytest.raises(ValueError, match=message):
        shard.check(dispatch.get("softmax"), dims, place, rules, mesh)


def test_mesh_of_one_device_needs_no_rules():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = {name: jnp.ones((1, 3, 1, 4)) for name in "qkv"}
    placement = shard.Placement(mesh, {}, "auto", "contiguous")
    out, _ = dispatch.apply("softmax", inputs, form="reference", placement=placement)
    assert bool(jnp.all(out == 1.0))
