"""A gradient that every place of the data axis has for its own rows, summed over that axis into the
layout of the optimizer state: an all-reduce, under ZeRO-1 (Rajbhandari et al. 2020, arXiv
1910.02054) a reduce-scatter.

An example: mesh data=2, fsdp=2, and the gradient [D=8, F=10], D over fsdp and data. Shapes of the
whole array as each line of the program sees it, and what one device has of it:

                                         whole         a device
    gradient of one place of data        [8, 10]       [4, 10]      `held`: D over fsdp
    scattered over data                                [2, 10]      each data place keeps its 2
      as two dimensions                  [2, 2, 10]    [1, 2, 10]   `scattered`: fsdp on the first
    of both places of data               [2, 4, 10]    [1, 2, 10]   `over_data`: data on the second
    as one dimension again               [8, 10]       [2, 10]      D over fsdp, then data

Two dimensions, since a shard_map over data alone can only say "data" of a dimension that it splits
by itself: row 4 f + 2 d + i of D lies at place f of fsdp and d of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import shard


def over_data(
    local: Callable[..., tuple[Any, Any]], mesh: Mesh, layouts: Any
) -> Callable[..., tuple[Any, Any]]:
    """`local(params, batch, *whole) -> gradients, sums` of the rows of one place of the data axis,
    as a function of the whole batch: gradients added up and laid out as `layouts`, a tree of
    NamedSharding like `params`; `sums` added up.
    """
    if mesh.shape["data"] == 1:
        return local
    places = jax.tree.map(_place, layouts)
    is_place = lambda leaf: isinstance(leaf, _Place)
    specs = lambda name: jax.tree.map(lambda p: getattr(p, name), places, is_leaf=is_place)

    def reduced(grads: Any) -> Any:
        return jax.tree.map(lambda place, x: place.reduce(x), places, grads, is_leaf=is_place)

    def summed(params: Any, batch: Any, *whole: Any) -> tuple[Any, Any]:
        grads, sums = local(params, batch, *whole)
        # Over every axis: where some are left to the compiler it gathers what it should scatter.
        here, _ = shard.here(mesh, {})
        inner = shard.wrap(reduced, here, (specs("held"),), specs("scattered"))
        return inner(grads), jax.lax.psum(sums, "data")

    def mapped(params: Any, batch: Any, *whole: Any) -> tuple[Any, Any]:
        grads, sums = jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(P(), P("data"), *(P() for _ in whole)),
            out_specs=(specs("over_data"), P()),
            # An axis of one device splits nothing, and a kernel wants no axis left to the compiler.
            axis_names={"data"} | {axis for axis, size in mesh.shape.items() if size == 1},
            check_vma=False,
        )(params, batch, *whole)
        joined = jax.tree.map(lambda x, like: x.reshape(like.shape), grads, params)
        return jax.lax.with_sharding_constraint(joined, layouts), sums

    return mapped


class _Place(NamedTuple):
    """How a gradient, laid out as `held` over the other axes, is summed over the data axis: whole
    where `axis` is None; else scattered along that dimension, which then is two, what the other
    axes make of it and what the data axis makes of that: `scattered`, `over_data`.
    """

    axis: int | None
    held: P
    scattered: P
    over_data: P

    def reduce(self, x: jax.Array) -> jax.Array:
        """Of what a device holds."""
        if self.axis is None:
            return jax.lax.psum(x, "data")
        lead, rest = x.shape[: self.axis], x.shape[self.axis + 1 :]
        # What follows as one dimension: the TPU compiler makes an all-reduce of more.
        rows = x.reshape(*lead, x.shape[self.axis], math.prod(rest))
        part = jax.lax.psum_scatter(rows, "data", scatter_dimension=self.axis, tiled=True)
        return part.reshape(*lead, 1, -1, *rest)


def _place(sharding: NamedSharding) -> _Place:
    """From a layout with the data axis at most once, as the inner axis of a dimension."""
    entries = [shard.axes(sharding.spec, i) for i in range(len(sharding.spec))]
    axis = next((i for i, names in enumerate(entries) if "data" in names), None)
    held = [tuple(name for name in names if name != "data") or None for names in entries]
    if axis is None:
        return _Place(None, P(*held), P(*held), P())
    split = P(*held[: axis + 1], None, *held[axis + 1 :])
    return _Place(axis, P(*held), split, P(*(None for _ in held[: axis + 1]), "data"))
