"""The state of attention: keys and values of the tokens so far, every row starting at slot 0.

    slot(b, t) = length_b + #{non-padding tokens of row b up to t} - 1

Empty slots have segment 0, so no query sees them. Tokens beyond the capacity are dropped; `length`
then exceeds S, which the caller can check.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels import segments


class CacheState(NamedTuple):
    """Keys, values and document of every slot, and the number of tokens seen by each row."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, " B"]


class ByHead(NamedTuple):
    """The same cache with the slots of a head beside each other, as a loop of steps takes it: a
    product with one head then reads its keys without copying them.
    """

    k: Float[Array, "B G S K"]
    v: Float[Array, "B G S V"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, " B"]


FIELDS = (("k", "B S G K"), ("v", "B S G V"), ("segment_ids", "B S"), ("length", "B"))


def create(dims: Mapping[str, int], dtype: DTypeLike, batch: int, max_len: int) -> CacheState:
    """An empty cache of `max_len` slots."""
    return CacheState(
        jnp.zeros((batch, max_len, dims["G"], dims["K"]), dtype),
        jnp.zeros((batch, max_len, dims["G"], dims["V"]), dtype),
        jnp.zeros((batch, max_len), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def by_head(state: CacheState | ByHead) -> ByHead:
    """The cache by heads: a copy, unless it is one already."""
    if isinstance(state, ByHead):
        return state
    k, v = (x.swapaxes(1, 2) for x in (state.k, state.v))
    return ByHead(k, v, state.segment_ids, state.length)


def current_segment(state: CacheState | ByHead) -> Int[Array, " B"]:
    """The document that the next token of each row continues; 1 in an empty row."""
    last = jnp.maximum(state.length - 1, 0)[:, None]
    return jnp.maximum(jnp.take_along_axis(state.segment_ids, last, axis=1)[:, 0], 1)


def append[C: (CacheState, ByHead)](
    state: C,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"],
) -> tuple[C, Int[Array, "B T"]]:
    """Writes the tokens that are not padding; returns the new cache and the slot of every token."""
    slot = segments.slots(segment_ids, state.length)
    capacity = state.segment_ids.shape[1]
    row = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
    # Padding is sent past the end, where mode="drop" discards it.
    target = jnp.where(segment_ids != 0, slot, capacity)
    where = (row, slice(None), target) if isinstance(state, ByHead) else (row, target)
    written = state._replace(
        k=state.k.at[where].set(k.astype(state.k.dtype), mode="drop"),
        v=state.v.at[where].set(v.astype(state.v.dtype), mode="drop"),
        segment_ids=state.segment_ids.at[row, target].set(segment_ids, mode="drop"),
        length=state.length + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32),
    )
    return written, slot


def extend[C: (CacheState, ByHead)](
    state: C,
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    *,
    strict: bool = False,
    window: int = 0,
) -> tuple[C, Int[Array, "B S"], Bool[Array, "B S"]]:
    """Appends one token per row: the new cache, the token's distance to every slot, and which
    slots it sees."""
    segment = current_segment(state)[:, None]
    state, slot = append(state, k[:, None], v[:, None], segment)
    source = jnp.arange(state.segment_ids.shape[1], dtype=jnp.int32)
    seen = segments.visible(slot, source, segment, state.segment_ids, strict=strict, window=window)
    return state, slot - source, seen


def from_sequence(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None,
) -> CacheState:
    """The cache after one whole sequence, with capacity S = T."""
    batch, time = k.shape[:2]
    if segment_ids is None:
        ones = jnp.ones((batch, time), jnp.int32)
        return CacheState(k, v, ones, jnp.full((batch,), time, jnp.int32))
    dims = {"G": k.shape[2], "K": k.shape[3], "V": v.shape[3]}
    return append(create(dims, k.dtype, batch, time), k, v, segment_ids)[0]


class Placed(NamedTuple):
    """New tokens among all the keys they may see.

    A slot of None is the index in the row; a segment of None means one document per row.
    """

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    q_slot: Int[Array, "B T"] | None
    q_segment: Int[Array, "B T"] | None
    kv_segment: Int[Array, "B S"] | None
    state: CacheState


def place(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None,
    state: CacheState | None,
) -> Placed:
    """The keys and values that T new tokens attend to, with or without a carried cache."""
    if state is None:
        return Placed(k, v, None, segment_ids, segment_ids, from_sequence(k, v, segment_ids))
    batch, time = k.shape[:2]
    if segment_ids is None:
        segment_ids = jnp.broadcast_to(current_segment(state)[:, None], (batch, time))
    state, slot = append(state, k, v, segment_ids)
    return Placed(state.k, state.v, slot, segment_ids, state.segment_ids, state)


def positions(where: Placed) -> tuple[Int[Array, "#B T"], Int[Array, "#B S"]]:
    """The index, from 0, of every query and every key inside its document."""
    source = jnp.arange(where.k.shape[1], dtype=jnp.int32)[None]
    if where.kv_segment is None:
        return source, source
    keys = segments.positions(where.kv_segment)
    if where.q_slot is None:
        return keys, keys
    slot = jnp.clip(where.q_slot, 0, keys.shape[1] - 1)
    return jnp.take_along_axis(keys, slot, axis=1), keys


def subdivide(where: Placed, block: int) -> Placed:
    """The same tokens, where every `block` tokens of a document become a document of their own."""
    q_position, kv_position = positions(where)
    source = jnp.arange(where.k.shape[1], dtype=jnp.int32)
    q_slot = source if where.q_slot is None else where.q_slot
    q_part = _part(q_slot, where.q_segment, q_position, block)
    kv_part = _part(source, where.kv_segment, kv_position, block)
    batch = where.k.shape[0]
    return where._replace(
        q_segment=jnp.broadcast_to(q_part, (batch, q_part.shape[1])),
        kv_segment=jnp.broadcast_to(kv_part, (batch, kv_part.shape[1])),
    )


def _part(slot: Array, segment: Array | None, position: Array, block: int) -> Array:
    # A part is named by the slot where it begins, plus 1: no two parts of a row share a name.
    part = slot - position % block + 1
    return part if segment is None else jnp.where(segment != 0, part, 0)


class Tokens(NamedTuple):
    """The places of tokens that are stored in any order: slot in the row, document (0: padding or
    an empty slot), index in the document.
    """

    slot: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    position: Int[Array, "B T"]

    def subdivided(self, block: int) -> "Tokens":
        """As `subdivide` does for `Placed`."""
        return self._replace(segment=_part(*self, block))


def tokens(segment_ids: Int[Array, "B T"], before: CacheState) -> tuple[Tokens, Tokens]:
    """The new tokens, and those of the cache that they continue; an empty cache has room for all
    new tokens."""
    capacity = before.segment_ids.shape[1]
    slot = segments.slots(segment_ids, before.length)
    is_token = segment_ids != 0
    row = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
    target = jnp.where(is_token, slot, capacity)
    after = before.segment_ids.at[row, target].set(segment_ids, mode="drop")
    position = segments.positions(after)
    inside = jnp.clip(slot, 0, capacity - 1)
    new = Tokens(slot, segment_ids, jnp.take_along_axis(position, inside, axis=1))
    every = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), after.shape)
    return new, Tokens(every, before.segment_ids, position)
