"""Collectives are read from HLO text: of handwritten programs, and of small ones that XLA
compiled.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lm.plan import hlo

MESH = {"data": 2, "fsdp": 4}

NESTED = (Path(__file__).parent / "nested.hlo").read_text(encoding="utf-8")


def test_handwritten_program() -> None:
    found = hlo.collectives(NESTED, MESH)
    shown = sorted((c.kind, c.times, c.bytes_sent, c.axes, c.dtypes) for c in found)
    assert shown == [
        ("all-gather", 1, 4 * 8 * 3 / 4, ("fsdp",), ("f32",)),  # one chain in two fusions
        ("all-gather", 1, 8 * 16 * 7 / 8, ("data", "fsdp"), ("f32",)),
        ("all-reduce", 15, 2 * 512 / 2, ("data",), ("f32",)),  # 3 * 5 times
        ("all-to-all", 1, 8 * 3 / 4, ("fsdp",), ("f32",)),
        ("collective-permute", 1, 8.0, ("fsdp",), ("f32",)),
        ("reduce-scatter", 1, 512 * 3 / 4, ("fsdp",), ("bf16",)),
    ]


def test_a_loop_in_steps_of_two() -> None:
    """The TPU compiler unrolls windowed matmuls like this: the counter takes 0, 2, 4 below 5."""
    before = "  %i = s32[] get-tuple-element(%p), index=0\n  %v"
    after = """  %two = s32[] constant(2)
  %i.0 = s32[] get-tuple-element(%p), index=0
  %i = s32[] add(%i.0, %two)
  %v"""
    assert before in NESTED
    found = hlo.collectives(NESTED.replace(before, after), MESH)
    assert [c.times for c in found if c.kind == "all-reduce"] == [3 * 3]


def test_metadata_of_a_kernel_does_not_end_a_computation() -> None:
    """Metadata spans several lines, and one of them begins with braces."""
    before = "  %i = s32[] get-tuple-element(%p), index=0\n"
    kernel = """  %k = f32[] custom-call(%p), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="kernel"}
"""
    assert before in NESTED
    found = hlo.collectives(NESTED.replace(before, before + kernel), MESH)
    assert found == hlo.collectives(NESTED, MESH)


@pytest.mark.parametrize(
    ("spelling", "first", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4), ("data",)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3), ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4), ("data",)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", (0, 4), ("data",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3), ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3), ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4), ("data",)),
        ("replica_groups={}", tuple(range(8)), ("data", "fsdp")),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", (0, 1), ()),  # half an axis
    ],
)
def test_groups_are_read_in_every_spelling(
    spelling: str, first: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    groups = hlo.groups(f"channel_id=1, {spelling}, use_global_device_ids=true", 8)
    assert groups[0] == first
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert hlo.axes_of(first, MESH) == axes


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bf16", 2), ("f32", 4), ("pred", 1), ("s8", 1), ("f8e4m3fn", 1), ("c64", 8)],
)
def test_bytes_of_types(dtype: str, size: int) -> None:
    assert hlo.num_bytes(dtype, (3, 5)) == 15 * size


def test_no_hlo() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_step {}")


def test_a_compiled_program() -> None:
    """A psum in a scan of length 6; a gather and a permutation outside it."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 2)

    def local(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.psum(carry * 0.5, "data"), None

        x, _ = jax.lax.scan(body, x, None, length=6)
        ring = [(i, (i + 1) % 4) for i in range(4)]
        moved = jax.lax.ppermute(x, "fsdp", ring)
        return jax.lax.all_gather(x + moved, "fsdp", axis=0, tiled=True)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.zeros((64, 8))).compile().as_text()
    assert text is not None
    found = {c.kind: (c.times, c.bytes_sent, c.axes) for c in hlo.collectives(text, MESH)}
    part = 16 * 8 * 4
    assert found == {
        "all-reduce": (6, 2 * part / 2, ("data",)),
        "collective-permute": (1, part, ("fsdp",)),
        "all-gather": (1, 4 * part * 3 / 4, ("fsdp",)),
    }
