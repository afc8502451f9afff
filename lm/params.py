"""What a parameter is: its letters, role and decay, declared where it is created.

`declare` wraps an initializer so that the variable arrives boxed in `Declared`, our own Flax axis
metadata. (`nn.with_partitioning` would need mesh axes; letters are not mesh axes.) `split` unboxes
a freshly initialized tree once, into arrays and a static tree of `ParamInfo`. Sharding, muP groups,
the decay mask and the parameter table all read that tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import struct
from flax.core import meta

Role = Literal["input", "hidden", "output", "vector"]
STACKED = "L"  # the letter of the dimension along which `nn.scan` stacks the layers of a group


class ParamInfo(NamedTuple):
    """`letters` name the dimensions (the glossary's, separated by spaces), `shape` gives their
    sizes. For a matrix between activations, `contracted` is the number of dimensions, after the
    layers' L, that are summed over. It is 0 for everything else.
    """

    letters: str
    shape: tuple[int, ...]
    role: Role
    decay: bool
    contracted: int = 0

    @property
    def is_stacked(self) -> bool:
        """Whether the first dimension is the layers of a group: this is a layer's parameter."""
        return self.letters.split()[0] == STACKED if self.letters else False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(layers, rows, columns) of the matrices in the array; rows are summed over. A parameter
        that is not a matrix between activations has its first dimension as rows; a vector has one
        column.
        """
        layers, *sizes = self.shape if self.is_stacked else (1, *self.shape)
        rows = math.prod(sizes[: max(self.contracted, 1)])
        return layers, rows, math.prod(sizes) // rows


class Declared(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A parameter value with its declaration. `nn.scan` adds the letter L through `add_axis`."""

    value: Any
    letters: str = struct.field(pytree_node=False)
    role: Role = struct.field(pytree_node=False)
    decay: bool = struct.field(pytree_node=False)
    contracted: int = struct.field(pytree_node=False, default=0)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        names = self.letters.split()
        names.insert(index, params[meta.PARTITION_NAME])
        return self.replace(letters=" ".join(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        names = self.letters.split()
        removed = names.pop(index)
        assert removed == params[meta.PARTITION_NAME], (removed, params)
        return self.replace(letters=" ".join(names))


def declare(
    init: Callable[..., Any], letters: str, role: Role, decay: bool, contracted: int = 0
) -> Callable[..., Any]:
    """An initializer for `self.param` whose value carries its `letters` ("D F"), its `role`,
    whether it decays, and for a matrix between activations the number of dimensions that are summed
    over.
    """

    def boxed(key: jax.Array, shape: tuple[int, ...], *args: Any) -> Declared:
        assert len(letters.split()) == len(shape), (
            f"{letters=} must name the {len(shape)} dimensions of a parameter of {shape=}"
        )
        return Declared(init(key, shape, *args), letters, role, decay, contracted)

    return boxed


def split(boxed: Any) -> tuple[Any, Any]:
    """A tree of `Declared` -> (tree of arrays, tree of ParamInfo). Also works on shapes from
    `jax.eval_shape`.

    Raises:
      TypeError: a parameter was not declared.
    """

    def info(keys: tuple[Any, ...], leaf: Any) -> ParamInfo:
        if not isinstance(leaf, Declared):
            where = "/".join(str(getattr(k, "key", k)) for k in keys)
            raise TypeError(f"parameter {where}: wrap its initializer in lm.params.declare")
        shape = tuple(leaf.value.shape)
        return ParamInfo(leaf.letters, shape, leaf.role, leaf.decay, leaf.contracted)

    is_declared = lambda leaf: isinstance(leaf, Declared)
    infos = jax.tree_util.tree_map_with_path(info, boxed, is_leaf=is_declared)
    return jax.tree.map(lambda leaf: leaf.unbox(), boxed, is_leaf=is_declared), infos


def is_info(leaf: Any) -> bool:
    """`is_leaf` for trees of ParamInfo (a NamedTuple is a tree node to JAX)."""
    return isinstance(leaf, ParamInfo)


def names(tree: Any) -> Any:
    """A tree of the same structure holding each leaf's path, "layers_0/mixer/q"."""

    def path(keys: tuple[Any, ...], _: Any) -> str:
        return "/".join(
            str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys
        )

    return jax.tree_util.tree_map_with_path(path, tree, is_leaf=is_info)


def count(infos: Any, *, without: str = "") -> dict[str, int]:
    """Number of parameters by role, and "total". Parameters with the letter `without` are not
    counted.
    """
    counts: dict[str, int] = {}
    for info in jax.tree.leaves(infos, is_leaf=is_info):
        if without and without in info.letters.split():
            continue
        counts[info.role] = counts.get(info.role, 0) + int(np.prod(info.shape))
    return {**counts, "total": sum(counts.values())}


def matrix_elements(infos: Any) -> int:
    """Elements of the matrices between activations: of role hidden, or declared `contracted`."""
    leaves = jax.tree.leaves(infos, is_leaf=is_info)
    return sum(math.prod(x.shape) for x in leaves if x.role == "hidden" or x.contracted)


def table(infos: Any) -> str:
    """A plain-text table, one parameter per line: name, letters, shape, role, decay, size. It is
    the run folder's params.txt.
    """
    leaves = jax.tree.leaves(infos, is_leaf=is_info)
    rows = [("name", "letters", "shape", "role", "decay", "size")]
    for name, info in zip(jax.tree.leaves(names(infos)), leaves, strict=True):
        shape = "x".join(map(str, info.shape))
        size = f"{int(np.prod(info.shape)):,}"
        rows.append((name, info.letters, shape, info.role, "yes" if info.decay else "no", size))
    rows += [("total", "", "", role, "", f"{n:,}") for role, n in count(infos).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return (
        "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        + "\n"
    )
