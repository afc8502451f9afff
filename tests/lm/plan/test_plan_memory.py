"""What a plan counts of memory by formula: activations under remat, layers, meshes, moments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lm.plan import memory
from tests.lm import tiny


def test_what_remat_keeps_is_counted() -> None:
    def kept(**model: Any) -> memory.Activations:
        changes = {f"model.{key}": value for key, value in model.items()}
        config = tiny.config(changes | {"model.num_layers": 3})
        return memory.measure(config, jax.devices()[:1])

    none, full = kept(remat="none"), kept(remat="full")
    stream = 3 * 24 * 32 * 4  # the input of each layer: layers x time x width in float32
    assert full.stream + full.inner < 0.3 * (none.stream + none.inner)
    assert full.stream >= stream
    far = kept(remat="named", kept={"mixer": "device", "mlp_up": "host"})
    assert far.host == 3 * 24 * 48 * 4
    assert far.stream == full.stream + stream
    assert {r.module for r in far.residuals if r.is_host} == {"groups_0/blocks_0/mlp/mlp_up"}


def test_remat_keeps_as_much_on_a_mesh_as_on_one_device() -> None:
    """A projection split over devices is not a dot to JAX's policy. It is named, so `dots` keeps it
    anyway.
    """

    def kept(remat: str, mesh: dict[str, Any], devices: int) -> float:
        changes = {"model.remat": remat, "model.num_heads": 8, "model.num_kv_heads": 8}
        config = tiny.config(changes | {"data.batch_size": 8, "mesh.data": 1} | mesh)
        return sum(r.row_bytes for r in memory.measure(config, jax.devices()[:devices]).residuals)

    alone = kept("dots", {}, 1)
    assert kept("full", {}, 1) < 0.5 * alone
    for mesh in ({"mesh.fsdp": 2}, {"mesh.tensor": 2}):
        assert kept("dots", mesh, 2) == pytest.approx(alone, rel=0.02)


def test_remat_runs_one_layer_at_a_time() -> None:
    """In a pattern as in equal layers, each layer's input is kept, and nothing inside the layer."""
    layers = {label: {"mixer": "softmax"} for label in "ab"}
    changes = {"model.remat": "full", "model.num_layers": 4, "model.layers": layers}
    equal, pattern = (
        memory.measure(tiny.config(changes | {"model.pattern": labels}), jax.devices()[:1])
        for labels in ("a", "a,b")
    )
    rows = [sum(r.row_bytes for r in found.residuals) for found in (equal, pattern)]
    assert rows[1] == pytest.approx(rows[0], rel=0.01)
    assert pattern.stream == equal.stream


def test_the_largest_layer_counts() -> None:
    """One layer at a time is differentiated, so the largest one counts, and not the mean."""

    def largest(pattern: str) -> tuple[float, float]:
        config = tiny.config({"model.pattern": pattern, "model.num_layers": 4})
        found = memory.measure(config, jax.devices()[:1])
        return found.largest_stream, found.largest_inner

    alone, both = largest("retnet"), largest("softmax,retnet")
    assert sum(alone) > 1.4 * sum(largest("softmax"))  # so a mean would be at most 0.86 of it
    assert both == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize(
    "mixer",
    ["s4d", *(pytest.param(m, marks=pytest.mark.slow) for m in ("h3", "mamba2", "lightnet"))],
)
def test_any_mixer_is_measured(mixer: str) -> None:
    found = memory.measure(tiny.config({"model.pattern": mixer}), jax.devices()[:1])
    assert found.stream > 0
    assert found.inner > 0


def test_a_mesh_of_three_is_measured() -> None:
    changes = {"mesh.data": 1, "mesh.tensor": 3, "model.num_heads": 3, "model.num_kv_heads": 3}
    found = memory.measure(tiny.config(changes), jax.devices()[:3])
    assert found.inner > 0


def test_moments_on_a_host_that_the_compiler_does_not_know() -> None:
    """NVIDIA's compiler has no host memory without a device. The formula counts it anyway."""
    place = SimpleNamespace(memory_kind=None)
    for ndim, where, expected in ((2, "host", True), (2, "device", False), (0, "host", False)):
        assert memory.is_on_host(SimpleNamespace(sharding=place, ndim=ndim), where) == expected
