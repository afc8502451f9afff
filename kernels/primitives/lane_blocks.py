"""Attention with time along lanes: how blocks are laid out for a TPU kernel.

Queries, keys and values are [rows, width, T]. So a number per token lies along lanes, instead of
taking 128 lanes for each token. Tiles are [keys, queries]. The blocks of keys that a block of
queries needs follow from the shapes where each row is one document; otherwise they follow from the
first and last document of each block.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.blocks import Attention, round_up
from kernels.primitives import interleaved
from kernels.primitives.kv_cache import Placed

LANES = 128


class Rows(NamedTuple):
    """Slot and document of every query and key (None where each row is one document), and for every
    query the first block of keys that may hold its document. Keys are in the order of
    `interleaved`.
    """

    slot: Int[Array, "B 1 T"]
    segment: Int[Array, "B 1 T"] | None
    kv_segment: Int[Array, "B 1 S"] | None
    farthest: Int[Array, "B 1 T"] | None


class Where(NamedTuple):
    """The nearest and the farthest block of keys that each block of queries needs (nearest <
    farthest if it needs none).
    """

    nearest: Int[Array, "B I"]
    farthest: Int[Array, "B I"]
    rows: Rows


def fit(blocks: Attention, time: int, source: int) -> Attention:
    """These tiles, or smaller ones that still fill whole rows of lanes.

    Raises:
      ValueError: the tiles do not fill whole rows of lanes.
    """
    for name, size in (("block_q", blocks.block_q), ("block_kv", blocks.block_kv)):
        if size % LANES:
            raise ValueError(f"{name}={size} must be a multiple of {LANES} on a TPU")
    return Attention(blocks.block_q, blocks.block_kv, LANES).fit(time, source)


def along_lanes(x: Float[Array, "B T H K"], block: int) -> Float[Array, "BH K T"]:
    """Time moved to the last axis and padded to whole blocks."""
    batch, time, heads, width = x.shape
    x = x.transpose(0, 2, 3, 1).reshape(batch * heads, width, time)
    return _pad(x, block)


def from_lanes(x: Float[Array, "BH K T"], batch: int, time: int) -> Float[Array, "B T H K"]:
    rows, width, _ = x.shape
    return x[..., :time].reshape(batch, rows // batch, width, time).transpose(0, 3, 1, 2)


def _pad(x: Array, block: int) -> Array:
    more = round_up(x.shape[-1], block) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def where(placed: Placed, time: int, blocks: Attention, *, strict: bool) -> Where:
    """The blocks of keys that every block of queries needs."""
    batch, source = placed.k.shape[:2]
    block_q, block_kv = blocks.block_q, blocks.block_kv
    num_q, num_kv = -(-time // block_q), -(-source // block_kv)
    if placed.q_segment is None or placed.kv_segment is None:
        slot = jnp.arange(num_q * block_q, dtype=jnp.int32)
        last = np.arange(1, num_q + 1) * block_q - 1 - strict
        nearest = jnp.asarray(np.minimum(last // block_kv, num_kv - 1), jnp.int32)
        nearest = jnp.broadcast_to(nearest, (batch, num_q))
        slot = jnp.broadcast_to(slot, (batch, 1, slot.shape[0]))
        rows = Rows(slot, None, None, jnp.zeros_like(slot))
        return Where(nearest, jnp.zeros_like(nearest), rows)
    slot = placed.q_slot
    if slot is None:
        slot = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    slot, q_segment = _pad(slot, block_q), _pad(placed.q_segment, block_q)
    kv_segment = _pad(placed.kv_segment, block_kv)
    q_low, q_high = _span(q_segment, q_segment, block_q)
    kv_low, kv_high = _span(kv_segment, kv_segment, block_kv)
    last = _span(slot, q_segment, block_q)[1] - strict
    meet = (q_low[..., None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[..., None])
    index = jnp.arange(num_kv, dtype=jnp.int32)
    meet &= index * block_kv <= last[..., None]
    nearest = jnp.max(jnp.where(meet, index, -1), axis=-1)
    first = jnp.min(jnp.where(meet, index, num_kv), axis=-1)
    low, high, own = kv_low[..., None], kv_high[..., None], q_segment[:, None]
    holds = (low <= own) & (own <= high)
    begins = jnp.min(jnp.where(holds, index[:, None], num_kv), axis=1)[:, None]
    return Where(
        nearest,
        first,
        Rows(
            slot[:, None],
            q_segment[:, None],
            interleaved.order_ids(kv_segment)[:, None],
            begins,
        ),
    )


def _span(
    x: Int[Array, "B T"], segment: Int[Array, "B T"], block: int
) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """The smallest and largest value in each block, ignoring padding."""
    batch = x.shape[0]
    x, real = x.reshape(batch, -1, block), segment.reshape(batch, -1, block) > 0
    low = jnp.min(jnp.where(real, x, np.iinfo(np.int32).max), axis=-1)
    return low, jnp.max(jnp.where(real, x, -1), axis=-1)


def at(block: Array, size: int) -> Any:
    """The slice of lanes that a block occupies."""
    return pl.ds(pl.multiple_of(block * size, size), size)
