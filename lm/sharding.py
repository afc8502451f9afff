"""Letters to mesh axes: one table for parameters, one for activations, and what follows from them.

A parameter dimension whose size does not divide its axes is an error unless its letter is listed in
mesh.replicate. Optimizer state follows the parameter it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.config import UserError
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
}


def activations(mesh: Mesh, replicate: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The activation table for this mesh: axes of size 1 and replicated letters dropped."""
    table = {
        letter: _live(axes, mesh) for letter, axes in ACTIVATIONS.items() if letter not in replicate
    }
    return {letter: axes for letter, axes in table.items() if axes}


def check_heads(
    dims: Mapping[str, int], mesh: Mesh, rules: Mapping[str, tuple[str, ...]], where: str
) -> None:
    """Heads of a layer must divide over the devices that share them, H and G alike.

    Raises:
      UserError: they do not.
    """
    if "G" in dims and rules.get("H") != rules.get("G"):
        raise UserError("mesh.replicate names one of 'H' and 'G'; name both or neither")
    for letter, size in dims.items():
        axes = rules.get(letter, ())
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            raise UserError(
                f"{where}: {letter}={size} heads are not divisible by {ways} ({'*'.join(axes)}); "
                "change the number or the mesh, or add 'H' and 'G' to mesh.replicate"
            )


def batch(mesh: Mesh) -> NamedSharding:
    """[B, T] arrays: rows over the batch axes."""
    return NamedSharding(mesh, P(_live(ACTIVATIONS["B"], mesh) or None))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def params(infos: Any, mesh: Mesh, replicate: tuple[str, ...]) -> Any:
    """A tree of NamedSharding for a tree of ParamInfo."""
    return jax.tree.map(
        lambda info: NamedSharding(mesh, _spec(info, mesh, replicate)), infos, is_leaf=is_info
    )


def like_params(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for optimizer state: a subtree shaped like the parameters takes theirs, everything
    else is replicated.
    """
    structure = jax.tree.structure(shardings)

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def assign(node: Any) -> Any:
        return shardings if is_params(node) else replicated(mesh)

    return jax.tree.map(assign, tree, is_leaf=is_params)


def _spec(info: ParamInfo, mesh: Mesh, replicate: tuple[str, ...]) -> P:
    dims: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for letter, size in zip(info.letters.split(), info.shape, strict=True):
        axes = tuple(a for a in _live(PARAMS.get(letter, ()), mesh) if a not in taken)
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways and letter not in replicate:
            raise UserError(
                f"a parameter with letters {info.letters!r} has {letter}={size}, not divisible by "
                f"{ways} ({'*'.join(axes)}); change the size or the mesh, "
                f"or add {letter!r} to mesh.replicate"
            )
        axes = () if size % ways else axes
        taken |= set(axes)
        dims.append(axes or None)
    return P(*dims)


def _live(axes: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)
