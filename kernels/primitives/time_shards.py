"""How T is laid out where devices share it, and the communication between ranks.

Ranks are numbered in the order of the mesh axes that T is split over, the first axis slowest. In
the contiguous layout, rank r of R holds the tokens r T/R ... (r + 1) T/R - 1 of every row. In the
zig-zag layout it holds stretches r and 2 R - 1 - r of 2 R equal ones, so that all ranks have the
same number of causal pairs. T = 8 over axes of 2 x 2 devices:

    device       (0, 0)   (0, 1)   (1, 0)   (1, 1)
    rank            0        1        2        3
    contiguous    0  1     2  3     4  5     6  7
    zigzag        0  7     1  6     2  5     3  4

A document may cross a border: `entry` is the document that the first token of a shard continues. A
carried state comes before rank 0 and is whole on every rank. The returned state is what the last
rank leaves (`last`), and is whole on every rank too. Everything here runs inside `jax.shard_map`,
and all ranks must call it in the same way.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.contract import Layout

LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")


class Shards(NamedTuple):
    """The mesh axes that T is split over, the number of ranks, and the layout of their tokens."""

    axes: tuple[str, ...]
    count: int
    layout: Layout

    @property
    def stretches(self) -> int:
        """How many contiguous pieces of a row each rank holds; a single rank holds the row as 1."""
        return 2 if self.layout == "zigzag" and self.count > 1 else 1

    def rank(self) -> Int[Array, ""]:
        """This device's number along T."""
        return lax.axis_index(self.axes)

    def from_before(self, tree: Any, distance: int) -> Any:
        """The value on the rank `distance` before this one (after it, where that is negative);
        zeros on ranks without such a neighbor. The derivative sends cotangents the other way.
        """
        pairs = [(r, r + distance) for r in range(self.count) if 0 <= r + distance < self.count]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, pairs), tree)

    def first(self, rank: Int[Array, ""], time: int) -> list[Int[Array, ""]]:
        """The place in the row of the first token of each stretch of `rank`, which holds `time`
        tokens."""
        size = time // self.stretches
        last = 2 * self.count - 1 - rank
        return [rank * size, last * size][: self.stretches]

    def in_order[X: (Array, np.ndarray)](self, x: X, axis: int) -> X:
        """Reorders T tokens along `axis` from rank after rank to time order; works on the host
        too."""
        if self.stretches == 1:
            return x
        xp: Any = x.__array_namespace__()
        apart = x.reshape(*x.shape[:axis], self.count, 2, -1, *x.shape[axis + 1 :])
        early, late = xp.unstack(apart, axis=axis + 1)
        return xp.concat([early, xp.flip(late, axis=axis)], axis=axis).reshape(x.shape)

    def by_rank[X: (Array, np.ndarray)](self, x: X, axis: int) -> X:
        """The inverse of `in_order`."""
        if self.stretches == 1:
            return x
        xp: Any = x.__array_namespace__()
        apart = x.reshape(*x.shape[:axis], 2, self.count, -1, *x.shape[axis + 1 :])
        early, late = xp.unstack(apart, axis=axis)
        return xp.stack([early, xp.flip(late, axis=axis)], axis=axis + 1).reshape(x.shape)

    def ranks(self, x: Array) -> Array:
        """[B, ...] of every rank -> [B, R, ...]."""
        return lax.all_gather(x, self.axes, axis=1)

    def row(self, x: Array) -> Array:
        """[B, T/R, ...] -> [B, T, ...] in time order; not differentiable."""
        return self.in_order(_gathered(self.axes, x), 1)

    def of_row(self, x: Array) -> Array:
        """[B, T, ...] in time order -> this rank's tokens [B, T/R, ...]."""
        time = x.shape[1] // self.count
        return lax.dynamic_slice_in_dim(self.by_rank(x, 1), self.rank() * time, time, axis=1)

    def own(self, x: Array) -> Array:
        """[B, R, ...] -> this rank's part [B, ...]."""
        return lax.dynamic_index_in_dim(x, self.rank(), axis=1, keepdims=False)

    def whole(self, x: Array) -> Array:
        """[B, T/R, ...] -> [B, T, ...] in time order; the cotangents of all ranks are summed in
        float32.
        """
        return self.in_order(_whole(self.axes, x), 1)

    def last(self, tree: Any) -> Any:
        """The value of the last rank, on every rank."""
        is_last = self.rank() == self.count - 1
        return jax.tree.map(
            lambda x: lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), self.axes), tree
        )

    def entry(
        self, segment_ids: Int[Array, "B T/R"] | None, first: Int[Array, " B"]
    ) -> Int[Array, " B"]:
        """The document of the token before this shard. Padding belongs to the document before it;
        `first` is the document before rank 0.
        """
        if segment_ids is None:  # every row is one document
            return jnp.where(self.rank() == 0, first, jnp.maximum(first, 1))
        none = jnp.zeros_like(first)
        newest = segments.continued(segment_ids, none, segment_ids.shape[1])[:, -1]
        # The ranks of a row are handled like the tokens of a shard; a rank with only padding has
        # id 0.
        belongs = segments.continued(self.ranks(newest), first, self.count)
        return self.own(segments.previous(belongs, first))


def _gathered(axes: tuple[str, ...], x: Array) -> Array:
    return lax.all_gather(x, axes, axis=1, tiled=True)


def _scattered(axes: tuple[str, ...], _: None, cotangent: Float[Array, "B T ..."]) -> tuple[Array]:
    # Autodiff would take the sum over ranks in the dtype of x.
    wide = cotangent.astype(jnp.float32)
    total = lax.psum_scatter(wide, axes, scatter_dimension=1, tiled=True)
    return (total.astype(cotangent.dtype),)


_whole = partial(jax.custom_vjp, nondiff_argnums=(0,))(_gathered)
_whole.defvjp(lambda axes, x: (_gathered(axes, x), None), _scattered)
