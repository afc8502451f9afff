"""Key/value heads that several devices share because there are fewer of them than parts of the
query heads; and a helper that applies a change along the heads of every array of a state.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax


class GroupedHeads(NamedTuple):
    """`heads` = G key/value heads, whole on every device, while the query heads are split over
    `axes` into `ways` parts. Each part takes the key/value heads that its query heads read.
    """

    axes: tuple[str, ...]
    ways: int
    heads: int

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """Inside shard_map: [..., G, ...] -> [..., G / ways or 1, ...]."""
        first = jax.lax.axis_index(self.axes) * self.heads // self.ways
        return jax.lax.dynamic_slice_in_dim(x, first, max(1, self.heads // self.ways), axis)

    def once(self, x: jax.Array, axis: int) -> jax.Array:
        """Outside shard_map: the parts' heads side by side, with copies removed."""
        copies = max(1, self.ways // self.heads)
        # Not a strided slice: partitioned, its transpose gave twice the cotangent.
        apart = x.reshape(*x.shape[:axis], -1, copies, *x.shape[axis + 1 :])
        return jax.lax.index_in_dim(apart, 0, axis + 1, keepdims=False)


def along(
    heads: str, change: Callable[[jax.Array, int], jax.Array], x: jax.Array, letters: str
) -> jax.Array:
    """`change(x, axis)` along the first dimension of x whose letter is in `heads` ("G" or "HG"); x
    itself where it has none."""
    axis = next((i for i, letter in enumerate(letters.split()) if letter in heads), None)
    return x if axis is None else change(x, axis)


def along_each(
    heads: str,
    change: Callable[[jax.Array, int], jax.Array],
    state: Any,
    fields: Sequence[tuple[str, str]],
) -> Any:
    """`along` for every array of a state, whose `fields` are (name, letters)."""
    leaves = zip(jax.tree.leaves(state), fields, strict=True)
    changed = [along(heads, change, x, letters) for x, (_, letters) in leaves]
    return jax.tree.unflatten(jax.tree.structure(state), changed)
