"""Causal attention cut into tiles, and the list of tiles that hold at least one visible pair.

Queries `[B, T, H, K]` become `[I, N, rows, K]`: I blocks, N = B G, and `rows` holds the block's
queries of all heads that read one key head. So a tile is one batched matrix product for any
grouping of heads. Keys become `[J, N, block_kv, K]`.

Tiles (i, j) are listed by ascending i and, for each i, by descending j: nearest keys first. A
backward pass walks the list from its end. A tile outside the list is never computed. What the
shapes alone decide (causality, window) is decided here at trace time. What depends on documents or
on a cache is decided on the device: the needed tiles are sorted to the front and counted.

With I = J = 2 and no window the list is (0,0) (1,1) (1,0): tile (0,1) lies in the future.

`apart` splits a tile into two kinds: (i, j) holds the pairs within the window, (I + i, J + j) the
pairs of the same queries with global tokens beyond the window. With four tokens in blocks of two,
window = 2 and global_tokens = 1, the pairs (2, 0) and (3, 0) are beyond the window. So the list is
(0,0) (1,1) (1,0) and then (3,2), which is tile (1,0) once more, for those two pairs.

`parts` = P > 1 cuts the N rows of every block into P blocks of N / P rows, each with its own tiles:
block i P + p of queries is paired with block j P + p of keys. So a tile can be skipped for one head
and computed for another. With P = N = 2 and one block each way, the tiles are (0,0) and (1,1).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels import segments
from kernels.blocks import Attention, attention, round_up
from kernels.primitives import kv_cache
from kernels.primitives.kv_cache import Placed, Tokens


class Sight(NamedTuple):
    """Which keys of its document a query sees; known at trace time.

    A key must not lie in the future (with `strict`, nor be the query's own token), and must be less
    than `window` away or among the first `global_tokens`. With `apart`, pairs beyond the window
    form tiles of a second kind, (I + i, J + j).
    """

    strict: bool = False
    window: int = 0
    global_tokens: int = 0
    apart: bool = False


class Tiles(NamedTuple):
    """Slots and segments of every block, positions in the document (where there are global tokens),
    the list of tiles, and how many tiles at the front of the list are needed.
    """

    q_slot: Int[Array, "I N rows"]
    kv_slot: Int[Array, "J n block_kv"]
    q_segment: Int[Array, "I N rows"] | None
    kv_segment: Int[Array, "J N block_kv"] | None
    kv_position: Int[Array, "J N block_kv"] | None
    pairs: Int[Array, "P 2"]
    needed: Int[Array, ""]


def _pad(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, round_up(x.shape[axis], multiple) - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def split_queries(
    x: Float[Array, "B T H K"], groups: int, block: int
) -> Float[Array, "I N rows K"]:
    """Queries in blocks; the rows of a block are (head of the group, query), in this order."""
    x = _pad(x, 1, block)
    batch, time, heads, width = x.shape
    x = x.reshape(batch, time // block, block, groups, heads // groups, width)
    x = x.transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(time // block, batch * groups, heads // groups * block, width)


def merge_queries(
    x: Float[Array, "I N rows V"], batch: int, time: int, block: int
) -> Float[Array, "B T H V"]:
    """The inverse of `split_queries`; drops the padding."""
    number, _, rows, width = x.shape
    x = x.reshape(number, batch, -1, rows // block, block, width)
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, number * block, -1, width)[:, :time]


def split_keys(x: Float[Array, "B S G K"], block: int) -> Float[Array, "J N block K"]:
    """Keys or values in blocks."""
    return split_queries(x, x.shape[2], block)


def merge_keys(x: Float[Array, "J N block K"], batch: int, time: int) -> Float[Array, "B S G K"]:
    """The inverse of `split_keys`; drops the padding."""
    return merge_queries(x, batch, time, x.shape[2])


def _rows(x: Int[Array, "B T"], heads: int, groups: int, block: int) -> Int[Array, "I N rows"]:
    wide = jnp.broadcast_to(x[..., None, None], (*x.shape, heads, 1))
    return split_queries(wide, groups, block)[..., 0]


def part(x: Shaped[Array, "I N *rest"], parts: int) -> Shaped[Array, "IP n *rest"]:
    """Blocks of N rows as `parts` times as many blocks of N / parts rows. N = 1 is repeated."""
    if x.shape[1] == 1:
        return jnp.repeat(x, parts, axis=0)
    return x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])


def unpart(x: Shaped[Array, "IP n *rest"], parts: int) -> Shaped[Array, "I N *rest"]:
    """The inverse of `part`."""
    return x.reshape(x.shape[0] // parts, x.shape[1] * parts, *x.shape[2:])


def _order(num_q: int, num_kv: int, parts: int, kinds: int) -> np.ndarray:
    blocks = itertools.product(range(kinds), range(num_q), range(parts), reversed(range(num_kv)))
    pairs = [((c * num_q + i) * parts + p, (c * num_kv + j) * parts + p) for c, i, p, j in blocks]
    return np.array(pairs, np.int32)


def _static_need(
    num: tuple[int, int], blocks: Attention, sight: Sight, is_one_document: bool
) -> tuple[Bool[np.ndarray, "I J"], ...]:
    """For each kind: whether tile (i, j) has a visible pair, or may have one where documents can
    begin anywhere."""
    first_q = np.arange(num[0])[:, None] * blocks.block_q
    first_kv = np.arange(num[1])[None, :] * blocks.block_kv
    farthest = first_q + blocks.block_q - 1 - first_kv
    near = first_q - (first_kv + blocks.block_kv - 1) < (sight.window or np.inf)
    held = first_kv < (sight.global_tokens if is_one_document else np.inf)
    held &= sight.global_tokens > 0
    return _kinds(farthest, near, held, sight)


def _kinds(farthest: Any, near: Any, held: Any, sight: Sight) -> tuple[Any, ...]:
    """Which kinds of tile are needed, given the largest distance in a tile, whether some pair is
    within the window (`near`), and whether some key is a global token (`held`).
    """
    causal = farthest >= int(sight.strict)
    if sight.apart:
        return causal & near, held & (farthest >= sight.window)
    return (causal & (near | held),)


def _span(x: Int[Array, "I N rows"], valid: Bool[Array, "I N rows"]) -> tuple[Array, Array]:
    low = jnp.min(jnp.where(valid, x, np.iinfo(np.int32).max), axis=-1)
    high = jnp.max(jnp.where(valid, x, -1), axis=-1)
    return low, high


def _dynamic_need(tiles: Tiles, sight: Sight) -> Bool[Array, "kinds I J N"]:
    """Whether a row of the batch may see a pair of the tile, by the ranges of both blocks' ids."""
    assert tiles.q_segment is not None
    assert tiles.kv_segment is not None
    q_valid, kv_valid = tiles.q_segment > 0, tiles.kv_segment > 0
    q_low, q_high = _span(tiles.q_segment, q_valid)
    kv_low, kv_high = _span(tiles.kv_segment, kv_valid)
    meet = (q_low[:, None] <= kv_high[None]) & (kv_low[None] <= q_high[:, None])
    first, last = _span(jnp.broadcast_to(tiles.q_slot, q_valid.shape), q_valid)
    oldest, newest = _span(jnp.broadcast_to(tiles.kv_slot, kv_valid.shape), kv_valid)
    farthest = last[:, None] - oldest[None]
    near, held = jnp.ones_like(meet), jnp.zeros_like(meet)
    if sight.window:
        near = first[:, None] - newest[None] < sight.window
    if tiles.kv_position is not None:
        held = jnp.any(kv_valid & (tiles.kv_position < sight.global_tokens), axis=-1)[None]
    return meet & jnp.stack(_kinds(farthest, near, held, sight))


def plan(
    where: Placed, shape: tuple[int, int], blocks: Attention, sight: Sight, parts: int = 1
) -> Tiles:
    """The tiles of T queries in H heads, `shape` = (T, H), on the keys that they may see."""
    time, heads = shape
    source, groups = where.k.shape[1:3]
    num = -(-time // blocks.block_q), -(-source // blocks.block_kv)
    kv_slot = jnp.arange(num[1] * blocks.block_kv, dtype=jnp.int32).reshape(num[1], 1, -1)
    order = _order(*num, parts, 1 + sight.apart)
    kind, i, j = order[:, 0] // (num[0] * parts), *(order // parts % num).T
    if where.q_slot is None:
        chosen = np.stack(_static_need(num, blocks, sight, where.q_segment is None))[kind, i, j]
        order, kind, i, j = order[chosen], kind[chosen], i[chosen], j[chosen]
        index = jnp.arange(num[0] * blocks.block_q, dtype=jnp.int32)[None]
        q_slot = _rows(index, heads // groups, 1, blocks.block_q)
    else:
        q_slot = _rows(where.q_slot, heads, groups, blocks.block_q)
    pairs, number = jnp.asarray(order), jnp.int32(len(order))
    if where.q_segment is None or where.kv_segment is None:
        position = kv_slot if sight.global_tokens else None
        return _parted(Tiles(q_slot, kv_slot, None, None, position, pairs, number), parts)
    position = None
    if sight.global_tokens:
        position = _rows(kv_cache.positions(where)[1], groups, groups, blocks.block_kv)
    tiles = Tiles(
        q_slot,
        kv_slot,
        _rows(where.q_segment, heads, groups, blocks.block_q),
        _rows(where.kv_segment, groups, groups, blocks.block_kv),
        position,
        pairs,
        number,
    )
    return _decided(tiles, order, sight, parts)


def between(
    q: Tokens, kv: Tokens, shape: tuple[int, int], blocks: Attention, sight: Sight, parts: int = 1
) -> Tiles:
    """The tiles of queries in `shape` = (H, G) heads on keys anywhere in the row, for example
    another rank's. Which tiles are needed is decided on the device alone.
    """
    heads, groups = shape
    num = -(-q.slot.shape[1] // blocks.block_q), -(-kv.slot.shape[1] // blocks.block_kv)
    order = _order(*num, parts, 1 + sight.apart)
    q_slot, q_segment = (_rows(x, heads, groups, blocks.block_q) for x in (q.slot, q.segment))
    kv_slot, kv_segment, position = (_rows(x, groups, groups, blocks.block_kv) for x in kv)
    position = position if sight.global_tokens else None
    pairs, number = jnp.asarray(order), jnp.int32(len(order))
    tiles = Tiles(q_slot, kv_slot, q_segment, kv_segment, position, pairs, number)
    return _decided(tiles, order, sight, parts)


def _decided(tiles: Tiles, order: np.ndarray, sight: Sight, parts: int) -> Tiles:
    """Keeps the tiles of `order` that documents and slots make visible, then cuts into parts."""
    num = tiles.q_slot.shape[0], tiles.kv_slot.shape[0]
    kind, i, j = order[:, 0] // (num[0] * parts), *(order // parts % num).T
    need = _dynamic_need(tiles, sight)
    need = need.reshape(*need.shape[:3], parts, -1).any(axis=-1)
    return _parted(keep(tiles, need[kind, i, j, order[:, 0] % parts]), parts)


def keep(tiles: Tiles, wanted: Bool[Array, " P"]) -> Tiles:
    """The list in the same order, where only the needed tiles that are `wanted` stay needed."""
    wanted &= jnp.arange(tiles.pairs.shape[0]) < tiles.needed
    chosen = jnp.argsort(~wanted, stable=True)
    return tiles._replace(pairs=tiles.pairs[chosen], needed=jnp.sum(wanted, dtype=jnp.int32))


def _parted(tiles: Tiles, parts: int) -> Tiles:
    q_slot, kv_slot, q_segment, kv_segment, kv_position = (
        None if x is None else part(x, parts) for x in tiles[:5]
    )
    assert q_slot is not None
    assert kv_slot is not None
    return Tiles(q_slot, kv_slot, q_segment, kv_segment, kv_position, tiles.pairs, tiles.needed)


def ends(tiles: Tiles) -> Int[Array, " P"]:
    """For every needed tile: where in the list the tiles of the next block of queries begin."""
    number = tiles.pairs.shape[0]
    beyond = jnp.where(jnp.arange(number) < tiles.needed, tiles.pairs[:, 0], number)
    return jnp.searchsorted(beyond, tiles.pairs[:, 0], side="right").astype(jnp.int32)


def farthest(tiles: Tiles, parts: int) -> Int[Array, "IP n rows"]:
    """The first block of keys that may hold the document of each query; the number of blocks where
    none does. Blocks are counted as before the cut into parts.
    """
    if tiles.q_segment is None or tiles.kv_segment is None:
        return jnp.zeros((tiles.q_slot.shape[0], 1, 1), jnp.int32)
    segment = unpart(tiles.q_segment, parts)
    low, high = (
        unpart(x, parts)[None, ..., None] for x in _span(tiles.kv_segment, tiles.kv_segment > 0)
    )
    holds = (low <= segment[:, None]) & (segment[:, None] <= high)
    number = holds.shape[1]
    index = jnp.arange(number, dtype=jnp.int32)[:, None, None]
    return part(jnp.min(jnp.where(holds, index, number), axis=1), parts)


class Cut(NamedTuple):
    """One problem in tiles, float32: scaled queries, keys and values."""

    q: Float[Array, "I N rows K"]
    k: Float[Array, "J N block K"]
    v: Float[Array, "J N block V"]
    tiles: Tiles
    blocks: Attention


def cut(
    q: Float[Array, "B T H K"],
    where: Placed,
    blocks: Attention | None,
    *,
    scale: float,
    sight: Sight,
    parts: int = 1,
) -> Cut:
    """Queries and the keys they may see, in tiles; `blocks` None takes the default sizes."""
    time, heads = q.shape[1:3]
    source, groups = where.k.shape[1:3]
    blocks = (blocks or attention(time, source)).fit(time, source)
    return Cut(
        part(split_queries(q.astype(jnp.float32) * scale, groups, blocks.block_q), parts),
        part(split_keys(where.k.astype(jnp.float32), blocks.block_kv), parts),
        part(split_keys(where.v.astype(jnp.float32), blocks.block_kv), parts),
        plan(where, (time, heads), blocks, sight, parts),
        blocks,
    )


def block(x: Array, i: Int[Array, ""]) -> Array:
    """x[i]; the index must be in range."""
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False, allow_negative_indices=False)


def transposed(x: Array, *, sparing: bool) -> Callable[[Int[Array, ""]], Array]:
    """A function that returns x[i] with its matrices transposed. It reads a transposed copy of all
    of x or, when `sparing` memory, transposes each block as it is read. Products with the result
    are plain row-major products, which are the fast ones on a CPU.
    """
    if not sparing:
        x_t = jnp.swapaxes(x, -1, -2)
        return lambda i: block(x_t, i)
    # The barrier keeps XLA from folding the transpose into the product.
    return lambda i: lax.optimization_barrier(jnp.swapaxes(block(x, i), -1, -2))


def put(x: Array, i: Int[Array, ""], value: Array) -> Array:
    """x with block i replaced, written so that XLA updates a loop's carry in place."""
    return lax.dynamic_update_index_in_dim(x, value, i, 0, allow_negative_indices=False)


def add(x: Array, i: Int[Array, ""], value: Array) -> Array:
    """x with `value` added to block i; `x.at[i].add` would compile to a scatter."""
    return put(x, i, block(x, i) + value)


def mask(
    tiles: Tiles, i: Int[Array, ""], j: Int[Array, ""], sight: Sight
) -> Bool[Array, "N rows block_kv"]:
    """The visible pairs of tile (i, j)."""
    num_q, num_kv = tiles.q_slot.shape[0], tiles.kv_slot.shape[0]
    is_far = i >= num_q
    if sight.apart:
        i, j = i % num_q, j % num_kv
    slots = block(tiles.q_slot, i)[..., :, None], block(tiles.kv_slot, j)[..., None, :]
    q_segment = None if tiles.q_segment is None else block(tiles.q_segment, i)[..., :, None]
    kv_segment = None if tiles.kv_segment is None else block(tiles.kv_segment, j)[..., None, :]
    pairs = *slots, q_segment, kv_segment
    if tiles.kv_position is None:
        return segments.visible(*pairs, strict=sight.strict, window=sight.window)
    near = slots[0] - slots[1] < sight.window
    held = block(tiles.kv_position, j)[..., None, :] < sight.global_tokens
    chosen = jnp.where(is_far, held & ~near, near) if sight.apart else held | near
    return segments.visible(*pairs, strict=sight.strict) & chosen
