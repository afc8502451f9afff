"""How T is laid out where devices share it, and what a rank asks of the others.

Of R ranks, rank r holds the tokens r T/R ... (r + 1) T/R - 1 of every row, in the order of the mesh
axes that T is split over, the first of them slowest. T = 8 over axes of 2 x 2 devices:

    device    (0, 0)   (0, 1)   (1, 0)   (1, 1)
    rank         0        1        2        3
    tokens     0  1     2  3     4  5     6  7

A document may cross a border: `entry` is the document that the first token of a shard continues. A
carried state comes before rank 0 and is whole on every rank. So is the state that is returned: it
is what the last rank leaves (`last`). Everything here runs inside `jax.shard_map`, where all ranks
must call it alike.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments


class Shards(NamedTuple):
    """The mesh axes that T is split over, and how many ranks they are."""

    axes: tuple[str, ...]
    count: int

    def rank(self) -> Int[Array, ""]:
        """This device's number along T."""
        return lax.axis_index(self.axes)

    def from_before(self, tree: Any, distance: int) -> Any:
        """What the rank `distance` before this one has; zeros on the first ranks, which have none
        there. Differentiated, the cotangents go the way back.
        """
        pairs = [(r, r + distance) for r in range(self.count - distance)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, pairs), tree)

    def ranks(self, x: Array) -> Array:
        """[B, ...] of every rank, as [B, R, ...]."""
        return lax.all_gather(x, self.axes, axis=1)

    def own(self, x: Array) -> Array:
        """The part [B, ...] of this rank of [B, R, ...]."""
        return lax.dynamic_index_in_dim(x, self.rank(), axis=1, keepdims=False)

    def whole(self, x: Array) -> Array:
        """[B, T/R, ...] -> [B, T, ...]; the cotangents of all ranks are summed in float32."""
        return _whole(self.axes, x)

    def last(self, tree: Any) -> Any:
        """On every rank what the last rank has."""
        is_last = self.rank() == self.count - 1
        return jax.tree.map(
            lambda x: lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), self.axes), tree
        )

    def entry(
        self, segment_ids: Int[Array, "B T/R"] | None, first: Int[Array, " B"]
    ) -> Int[Array, " B"]:
        """The document of the token before this shard; padding counts to the token before it,
        `first` is the document before rank 0.
        """
        if segment_ids is None:  # every row is one document
            return jnp.where(self.rank() == 0, first, jnp.maximum(first, 1))
        none = jnp.zeros_like(first)
        newest = segments.continued(segment_ids, none, segment_ids.shape[1])[:, -1]
        # Ranks are to the row what tokens are to a shard; one that holds only padding has id 0.
        belongs = segments.continued(self.ranks(newest), first, self.count)
        return self.own(segments.previous(belongs, first))


def _gathered(axes: tuple[str, ...], x: Array) -> Array:
    return lax.all_gather(x, axes, axis=1, tiled=True)


def _scattered(axes: tuple[str, ...], _: None, cotangent: Float[Array, "B T ..."]) -> tuple[Array]:
    # Left to autodiff the sum over ranks would be taken in the dtype of x.
    wide = cotangent.astype(jnp.float32)
    total = lax.psum_scatter(wide, axes, scatter_dimension=1, tiled=True)
    return (total.astype(cotangent.dtype),)


_whole = partial(jax.custom_vjp, nondiff_argnums=(0,))(_gathered)
_whole.defvjp(lambda axes, x: (_gathered(axes, x), None), _scattered)
