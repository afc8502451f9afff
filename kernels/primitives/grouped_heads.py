"""Heads that devices share: key-value heads that are fewer than the parts of the query heads, and
what is done to every array of a state along its heads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def along(
    heads: str, change: Callable[[jax.Array, int], jax.Array], x: jax.Array, letters: str
) -> jax.Array:
    """`change(x, axis)` along the first of these letters ("G", or "HG") that x has, else x."""
    axis = next((i for i, letter in enumerate(letters.split()) if letter in heads), None)
    return x if axis is None else change(x, axis)


def along_each(
    heads: str,
    change: Callable[[jax.Array, int], jax.Array],
    state: Any,
    fields: Sequence[tuple[str, str]],
) -> Any:
    """The same for every array of a state, whose `fields` are (name, letters)."""
    leaves = zip(jax.tree.leaves(state), fields, strict=True)
    changed = [along(heads, change, x, letters) for x, (_, letters) in leaves]
    return jax.tree.unflatten(jax.tree.structure(state), changed)
