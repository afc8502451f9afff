"""Key-value heads that fewer devices would share than their query heads are split over."""

from typing import NamedTuple

import jax


class GroupedHeads(NamedTuple):
    """Key-value heads that are whole on every device while the query heads are split over `axes`
    in `ways` parts: each part takes the G `heads` that its query heads read.
    """

    axes: tuple[str, ...]
    ways: int
    heads: int

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """Inside shard_map: [..., G, ...] -> [..., G / ways or 1, ...]."""
        first = jax.lax.axis_index(self.axes) * self.heads // self.ways
        return jax.lax.dynamic_slice_in_dim(x, first, max(1, self.heads // self.ways), axis)

    def once(self, x: jax.Array, axis: int) -> jax.Array:
        """Outside, what the parts gave side by side: every head once."""
        copies = max(1, self.ways // self.heads)
        # Not a slice with a stride: partitioned, its transpose gave twice the cotangent.
        apart = x.reshape(*x.shape[:axis], -1, copies, *x.shape[axis + 1 :])
        return jax.lax.index_in_dim(apart, 0, axis + 1, keepdims=False)
