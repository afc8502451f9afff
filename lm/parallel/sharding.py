"""Letters to mesh axes: one table for parameters, one for activations, and what follows from them.

A parameter dimension whose size is not divisible by its axes is an error unless mesh.replicate
lists its letter. Optimizer state is laid out like the parameter it belongs to; under ZeRO-1
(Rajbhandari et al. 2020, arXiv 1910.02054) it is split over the data axis, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.config import MeshConfig, UserError
from lm.params import ParamInfo, is_info

PARAMS: dict[str, tuple[str, ...]] = {
    "D": ("fsdp",),
    "F": ("tensor",),
    "H": ("tensor",),
    "G": ("tensor",),
    "vocab": ("tensor",),
}
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "T": ("sequence",),
    "H": ("tensor",),
    "G": ("tensor",),
    "F": ("tensor",),
    "vocab": ("tensor",),
}
ZERO1 = PARAMS | {"D": ("fsdp", "data")}
type AnyMesh = Mesh | AbstractMesh  # an AbstractMesh has no devices yet
STREAM = "stream"  # T of the residual stream; also over tensor with stream_over_tensor


def activations(config: MeshConfig, mesh: AnyMesh) -> dict[str, tuple[str, ...]]:
    """The activation table for this mesh, without axes of size 1 and replicated letters."""
    time = ACTIVATIONS["T"] + (("tensor",) if config.stream_over_tensor else ())
    whole = ACTIVATIONS | {STREAM: time}
    table = {x: _live(axes, mesh) for x, axes in whole.items() if x not in config.replicate}
    return {letter: axes for letter, axes in table.items() if axes}


def weights(
    config: MeshConfig, mesh: AnyMesh, sizes: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """The parameter table for this mesh, without axes of size 1. `sizes` are the model's sizes; a
    letter that is not divisible but listed in mesh.replicate is dropped.

    Raises:
      UserError: one of `sizes` is not divisible and must be.
    """
    table = {x: live for x, axes in PARAMS.items() if (live := _live(axes, mesh))}
    for letter, size in sizes.items():
        ways = math.prod(mesh.shape[axis] for axis in table.get(letter, ()))
        if size % ways and letter not in config.replicate:
            raise UserError(_indivisible(f"the model has {letter}={size}", table[letter], ways))
        if size % ways:
            del table[letter]
    return table


def _indivisible(what: str, axes: tuple[str, ...], ways: int) -> str:
    letter = what.split("=")[0].split()[-1]
    return (
        f"{what}, not divisible by {ways} ({'*'.join(axes)}); change the size or the mesh, or add "
        f"{letter!r} to mesh.replicate"
    )


def check_heads(
    dims: Mapping[str, int], mesh: AnyMesh, rules: Mapping[str, tuple[str, ...]], where: str
) -> None:
    """Checks that the heads of a layer divide over the devices that share them, H and G alike.

    Raises:
      UserError: they do not divide.
    """
    if "G" in dims and rules.get("G") and not rules.get("H"):
        raise UserError("mesh.replicate names 'H' and not 'G'; name both, or 'G' alone")
    for letter, size in dims.items():
        axes = rules.get(letter, ())
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            raise UserError(
                f"{where}: {letter}={size} heads are not divisible by {ways} ({'*'.join(axes)}); "
                "change the number or the mesh, or add "
                + ("'G'" if letter == "G" and ways % size == 0 else "'H' and 'G'")
                + " to mesh.replicate"
            )
    groups, ways = dims.get("G", 1), math.prod(mesh.shape[axis] for axis in rules.get("H", ()))
    if "G" not in rules and groups % ways and ways % groups:
        raise UserError(
            f"{where}: G={groups} heads, whole on each of {ways} devices "
            f"({'*'.join(rules['H'])}), neither divide them nor are a multiple of them; change the "
            "number or the mesh, or add 'H' to mesh.replicate"
        )


def batch(mesh: Mesh) -> NamedSharding:
    """The layout of [B, T] arrays of a batch or of scored rows: rows and time over their axes."""
    return NamedSharding(mesh, P(*(_live(ACTIVATIONS[x], mesh) or None for x in "BT")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def params(infos: Any, mesh: Mesh, config: MeshConfig) -> Any:
    """A tree of NamedSharding for a tree of ParamInfo."""
    return _tree(PARAMS, infos, mesh, config)


def moments(infos: Any, mesh: Mesh, config: MeshConfig) -> Any:
    """The same for an array of the optimizer state, and for the gradient that updates it."""
    return _tree(ZERO1 if config.zero1 else PARAMS, infos, mesh, config)


def like_params(tree: Any, infos: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for the optimizer state, a `tree` of shapes. In a subtree with the structure of the
    parameters, an array with a parameter's shape (a moment) takes the parameter's sharding, even
    where optax masks some parameters. Everything else, such as a count or the row sums of a
    factored moment, is replicated. All arrays are in the memory of the moments.
    """
    structure = jax.tree.structure(shardings)
    shapes = [info.shape for info in jax.tree.leaves(infos, is_leaf=is_info)]
    memory = jax.tree.leaves(shardings)[0].memory_kind

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node, is_leaf=is_masked) == structure

    def whole(leaf: Any) -> NamedSharding:
        is_moved = leaf.ndim > 0 and memory == "pinned_host"
        return replicated(mesh).with_memory_kind(memory) if is_moved else replicated(mesh)

    def assign(node: Any) -> Any:
        if not is_params(node):
            return whole(node)
        leaves = jax.tree.leaves(node, is_leaf=is_masked)
        triples = zip(leaves, shapes, jax.tree.leaves(shardings), strict=True)
        place = lambda leaf, shape, own: own if leaf.shape == shape else whole(leaf)
        found = [x if is_masked(x) else place(x, shape, own) for x, shape, own in triples]
        return jax.tree.unflatten(structure, found)

    return jax.tree.map(assign, tree, is_leaf=is_params)


Table = Mapping[str, tuple[str, ...]]


def _tree(table: Table, infos: Any, mesh: Mesh, config: MeshConfig) -> Any:
    def place(info: ParamInfo) -> NamedSharding:
        return NamedSharding(mesh, _spec(table, info, mesh, config.replicate))

    return jax.tree.map(place, infos, is_leaf=is_info)


def _spec(table: Table, info: ParamInfo, mesh: Mesh, replicate: tuple[str, ...]) -> P:
    dims: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for letter, size in zip(info.letters.split(), info.shape, strict=True):
        axes = tuple(a for a in _live(table.get(letter, ()), mesh) if a not in taken)
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways and letter not in replicate:
            what = f"a parameter with letters {info.letters!r} has {letter}={size}"
            raise UserError(_indivisible(what, axes, ways))
        while size % math.prod(mesh.shape[a] for a in axes):
            axes = axes[:-1]
        taken |= set(axes)
        dims.append(axes or None)
    return P(*dims)


def _live(axes: tuple[str, ...], mesh: AnyMesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)
