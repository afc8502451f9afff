"""The sum of a gradient over the data axis, into the layout of the optimizer state. Each place of
the data axis has the gradient of its own rows. The sum is an all-reduce; under ZeRO-1 (Rajbhandari
et al. 2020, arXiv 1910.02054) it is a reduce-scatter.

An example: mesh data=2, fsdp=2, and a gradient [D=8, F=10] with D over fsdp and data. The shapes of
the whole array at each step of the program, and of the part on one device:

                                         whole         one device
    gradient of one place of data        [8, 10]       [4, 10]      `held`: D over fsdp
    scattered over data                                [2, 10]      each data place keeps 2 rows
      as two dimensions                  [2, 2, 10]    [1, 2, 10]   `scattered`: fsdp on the first
    of both places of data               [2, 4, 10]    [1, 2, 10]   `over_data`: data on the second
    as one dimension again               [8, 10]       [2, 10]      D over fsdp, then data

D becomes two dimensions because a shard_map over data alone can only name "data" for a dimension
that data alone splits. Row 4 f + 2 d + i of D is on place f of fsdp and place d of data.
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
    """Makes `local(params, batch, *whole) -> gradients, sums`, which computes on the rows of one
    place of the data axis, a function of the whole batch. Its gradients are summed and laid out as
    `layouts`, a tree of NamedSharding like `params`; its `sums` are summed.
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
        # Manual over every axis: with axes left to the compiler, it gathers instead of scattering.
        here, _ = shard.here(mesh, {})
        inner = shard.wrap(reduced, here, (specs("held"),), specs("scattered"))
        return inner(grads), jax.lax.psum(sums, "data")

    def mapped(params: Any, batch: Any, *whole: Any) -> tuple[Any, Any]:
        grads, sums = jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(P(), P("data"), *(P() for _ in whole)),
            out_specs=(specs("over_data"), P()),
            # An axis of size 1 splits nothing, and a kernel must not have an axis left automatic.
            axis_names={"data"} | {axis for axis, size in mesh.shape.items() if size == 1},
            check_vma=False,
        )(params, batch, *whole)
        joined = jax.tree.map(lambda x, like: x.reshape(like.shape), grads, params)
        return jax.lax.with_sharding_constraint(joined, layouts), sums

    return mapped


class _Place(NamedTuple):
    """How one gradient is summed over the data axis.

    `held` is its layout over the other axes. If `axis` is None every data place gets the whole sum.
    Otherwise the sum is scattered along dimension `axis`, which becomes two dimensions: the layout
    `scattered` splits the first by the other axes, `over_data` the second by data. In the example
    above: axis = 0, held = P("fsdp", None), scattered = P("fsdp", None, None), over_data =
    P(None, "data").
    """

    axis: int | None
    held: P
    scattered: P
    over_data: P

    def reduce(self, x: jax.Array) -> jax.Array:
        """Reduces the part of a gradient that one device holds."""
        if self.axis is None:
            return jax.lax.psum(x, "data")
        lead, rest = x.shape[: self.axis], x.shape[self.axis + 1 :]
        # Later dimensions are flattened: with more, the TPU compiler makes this an all-reduce.
        rows = x.reshape(*lead, x.shape[self.axis], math.prod(rest))
        part = jax.lax.psum_scatter(rows, "data", scatter_dimension=self.axis, tiled=True)
        return part.reshape(*lead, 1, -1, *rest)


def _place(sharding: NamedSharding) -> _Place:
    """From a layout that has the data axis at most once, as the last axis of its dimension."""
    entries = [shard.axes(sharding.spec, i) for i in range(len(sharding.spec))]
    axis = next((i for i, names in enumerate(entries) if "data" in names), None)
    held = [tuple(name for name in names if name != "data") or None for names in entries]
    if axis is None:
        return _Place(None, P(*held), P(*held), P())
    split = P(*held[: axis + 1], None, *held[axis + 1 :])
    return _Place(axis, P(*held), split, P(*(None for _ in held[: axis + 1]), "data"))
