"""Padding between tokens of one document. An op that counts places in a row must close such gaps.

    [a, 0, b, c, 0, 0]  ->  [a, b, c, 0, 0, 0]        `together`, and `back` undoes it

Padding after the last token of a document and before the next document does no harm.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels import segments


class Gaps(NamedTuple):
    """Where tokens are, how many there are up to each place, and whether padding splits any
    document."""

    is_token: Bool[Array, "B T"]
    count: Int[Array, "B T"]
    any: Bool[Array, ""]


def gaps(
    segment_ids: Int[Array, "B T"], belongs: Int[Array, "B T"], entry: Int[Array, " B"]
) -> Gaps:
    """`belongs` is `segments.continued` of the ids and of the document at the entry."""
    is_token = segment_ids != 0
    count = jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
    after_padding = jnp.pad(~is_token[:, :-1], ((0, 0), (1, 0)))
    parted = is_token & after_padding & (belongs == segments.previous(belongs, entry))
    return Gaps(is_token, count, jnp.any(parted))


def find(places: Gaps, number: Int[Array, "B M"]) -> Int[Array, "B M"]:
    """The place in each row of the token with this number (from 0); the last place if none has
    it."""
    found = jax.vmap(jnp.searchsorted)(places.count, number + 1)
    return jnp.minimum(found, places.count.shape[1] - 1)


def take(x: Array, index: Int[Array, "B M"]) -> Array:
    """Row b of the result holds x[b, index[b]]."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def together(x: Array, places: Gaps) -> Array:
    """Moves the tokens of each row to the left, with zeros after them."""
    number = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), places.count.shape)
    is_there = number < places.count[:, -1:]
    return segments.put(0.0, ~is_there, take(x, find(places, number)))


def back(x: Array, places: Gaps) -> Array:
    """Moves the tokens back to where they were, with zeros on padding."""
    return segments.put(0.0, ~places.is_token, take(x, jnp.maximum(places.count - 1, 0)))
