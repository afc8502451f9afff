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
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

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
    if rules.get("H", ()) != rules.get("G", ()):
        heads, groups = rules.get("H", ()), rules.get("G", ())
        raise ValueError(f"rules split H over {heads} but G over {groups}; set both alike")


def num_shards(letter: str, rules: Rules, mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rules cut this letter into."""
    size = 1
    for axis in rules.get(letter, ()):
        size *= mesh.shape[axis]
    return size


def wrap(call: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`call` on the local part of every array."""
    # The forms loop with while and custom_vjp, whose replication types JAX cannot infer.
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
