"""Ops on a mesh: letters and rules become PartitionSpecs, and every shard runs the op by itself.

A rule maps a letter to mesh axes, `{"B": ("data", "fsdp"), "H": ("tensor",), "G": ("tensor",)}`;
letters without a rule are whole on every device. The `custom_vjp` of a form sits inside
`jax.shard_map`: the transpose of shard_map then sums the cotangent of an input over the axes that
its letters do not use (a bias over the batch axes) and over no others, which is the collective the
declaration implies; one outside would have to spell those sums out per op.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from kernels.contract import Dims

type Rules = Mapping[str, tuple[str, ...]]


class Placement(TypedDict, total=False):
    """Where a call runs: a mesh, and the rules that split it. Without them, on one device."""

    mesh: Mesh | None
    rules: Rules | None


def spec(letters: str, rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these letters."""
    axes = (rules.get(letter, ()) for letter in letters.split())
    return PartitionSpec(*(axis or None for axis in axes))


def check(dims: Dims, rules: Rules, mesh: Mesh | AbstractMesh, fixed: str) -> None:
    """Raise where a size does not divide its axes, or where the op cannot split a letter."""
    for letter, axes in rules.items():
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise ValueError(f"rules[{letter!r}] names {unknown[0]!r}; mesh has {mesh.axis_names}")
        shards = num_shards(letter, rules, mesh)
        if letter in fixed.split() and shards > 1:
            raise ValueError(f"this op cannot split {letter} over {axes} ({shards} shards)")
        if letter in dims and dims[letter] % shards:
            raise ValueError(
                f"{letter}={dims[letter]} must be a multiple of {shards}, the size of {axes}"
            )
    heads, groups = rules.get("H", ()), rules.get("G", ())
    if groups and heads != groups:
        raise ValueError(
            f"rules split H over {heads} but G over {groups}; set both alike or leave G whole"
        )
    if "G" in dims and not groups:
        ways = num_shards("H", rules, mesh)
        if ways % dims["G"] and dims["G"] % ways:
            raise ValueError(
                f"G={dims['G']} heads, whole on {ways} shards of H, must divide them or be a "
                "multiple of them"
            )


def fitting(letters: str, shape: tuple[int, ...], rules: Rules, mesh: Any) -> PartitionSpec:
    """As `spec`, for a layout and not a program: a size that does not divide stays whole, and so
    does a letter whose axes an earlier one has.
    """
    taken: set[str] = set()
    axes = []
    for letter, size in zip(letters.split(), shape, strict=True):
        own = rules.get(letter, ())
        fits = size % num_shards(letter, rules, mesh) == 0 and not taken & set(own)
        taken |= set(own) if fits else set()
        axes.append(own if fits and own else None)
    return PartitionSpec(*axes)


def here(mesh: Mesh, rules: Rules) -> tuple[Mesh | AbstractMesh, dict[str, tuple[str, ...]]]:
    """Mesh and rules for a `jax.shard_map` or a sharding constraint at this place of the program:
    inside a shard_map, the axes that it is over are spoken for.
    """
    around = jax.sharding.get_abstract_mesh()
    taken = [] if around.empty else [a for a in around.axis_names if _is_manual(around, a)]
    left = {letter: tuple(a for a in axes if a not in taken) for letter, axes in rules.items()}
    return around if taken else mesh, {letter: axes for letter, axes in left.items() if axes}


def _is_manual(mesh: AbstractMesh, axis: str) -> bool:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis] == AxisType.Manual


class GroupedHeads:
    """Key-value heads that are whole on every device while the query heads are split over `axes`
    in `ways` parts: each part takes the G heads that its query heads read.
    """

    def __init__(self, axes: tuple[str, ...], ways: int, heads: int) -> None:
        self.axes, self.ways, self.heads = axes, ways, heads
        self.size = max(1, heads // ways)

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """Inside shard_map: [..., G, ...] -> [..., G / ways or 1, ...]."""
        first = jax.lax.axis_index(self.axes) * self.heads // self.ways
        return jax.lax.dynamic_slice_in_dim(x, first, self.size, axis)

    def once(self, x: jax.Array, axis: int) -> jax.Array:
        """Outside, what the parts gave side by side: every head once."""
        return jax.lax.slice_in_dim(x, 0, None, max(1, self.ways // self.heads), axis)


def num_shards(letter: str, rules: Rules, mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rules cut this letter into."""
    size = 1
    for axis in rules.get(letter, ()):
        size *= mesh.shape[axis]
    return size


def wrap(call: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`call` on the local part of every array."""
    free = {
        axis for axis in mesh.axis_names if isinstance(mesh, Mesh) or not _is_manual(mesh, axis)
    }
    # The forms loop with while and custom_vjp, whose replication types JAX cannot infer.
    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=free,
        check_vma=False,
    )
