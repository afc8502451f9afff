"""Stick-breaking attention over a split time axis. Either every rank gathers all keys and values,
or it gets all tokens of some heads, or it visits the blocks of all ranks in turn
(`primitives.ring`).

The ring visits blocks as `chunked` does: forward from the nearest to the farthest, carrying `left`;
backward in the opposite order, carrying `flow`. So a rank must hold consecutive tokens; in a
zig-zag layout blocks would arrive in another order. `left` is saved before each block (R floats per
row) and recomputed within a block; it is never recovered by subtracting from a total. The ring
always runs the tiles of `chunked`, whichever form is named.

A tile is skipped where its sticks are used up. With a tolerance that means that no row has more
than the tolerance left, separately for each row of the batch and each key head. Without one it
means that less than e^-104 is left, so that every farther weight is 0 in float32. Skipped blocks
still travel on to other ranks. The backward pass visits the tiles that the forward pass visited.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels import segments
from kernels.blocks import Attention
from kernels.contract import Op, Options, Strategy, takes_all
from kernels.letters import Inputs
from kernels.primitives import causal_tiles, gathered_keys, head_exchange, ring
from kernels.primitives.causal_tiles import Sight, Tiles, put
from kernels.primitives.kv_cache import CacheState, Tokens
from kernels.primitives.ring import Block, Where
from kernels.primitives.time_shards import Shards
from kernels.stickbreaking import chunked
from kernels.stickbreaking.chunked import Keys

# e^-104 is less than half of the smallest float32.
_NOTHING = 104.0


class Static(NamedTuple):
    """What is known at trace time."""

    shards: Shards
    tiles: chunked.Static
    blocks: Attention
    heads: tuple[int, int]

    def plan(self, where: Where, tokens: Tokens) -> Tiles:
        """The tiles of this rank's queries on a slab of keys."""
        tiles = self.tiles
        given = self.heads, self.blocks, tiles.sight, tiles.parts
        return causal_tiles.between(where.own, tokens, *given)

    def split(self, slab: Block) -> Keys:
        """A slab as the keys and values of tiles, in float32."""
        cut = lambda x: causal_tiles.split_keys(x.astype(jnp.float32), self.blocks.block_kv)
        return Keys(*(causal_tiles.part(cut(x), self.tiles.parts) for x in slab))


class Entry(NamedTuple):
    """`left` before a block, and which blocks of queries visited each slab of the block."""

    left: Float[Array, "*R I N rows"]
    visited: Bool[Array, "*R J I"]


class Residuals(NamedTuple):
    """What the backward pass needs: inputs, and the entries of all blocks."""

    q: Float[Array, "I N rows K"]
    own: Block
    cache: Block | None
    where: Where
    entries: Entry
    last: Entry | None


def _run(
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: CacheState | None,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, CacheState]:
    """The output of this rank's tokens, and the cache after the tokens of all ranks."""
    del local, op
    q = inputs["q"]
    batch, time, num_heads = q.shape[:3]
    groups = inputs["k"].shape[2]
    own, cache, where, after = ring.problem(inputs, segment_ids, state, shards)
    blocks, sight = ring.tiles(time), Sight(strict=not options["attend_current"])
    parts = batch * groups if options["tolerance"] else 1
    tiles = chunked.Static(sight, blocks.run, options["tolerance"], parts, sparing=True)
    static = Static(shards, tiles, blocks, (num_heads, groups))
    wide = q.astype(jnp.float32) * options["scale"]
    q_blocks = causal_tiles.part(causal_tiles.split_queries(wide, groups, blocks.block_q), parts)
    out, log_rem = attend(static, q_blocks, own, cache, where)
    out = chunked.merge(out, log_rem, inputs, options, blocks.block_q, parts)
    return segments.blank_padding(out, segment_ids).astype(q.dtype), after


def _attend(
    static: Static,
    q: Float[Array, "I N rows K"],
    own: Block,
    cache: Block | None,
    where: Where,
) -> tuple[Float[Array, "I N rows V"], Float[Array, "I N rows"]]:
    """The output before the remainder, and log rem, of blocked queries."""
    return _forward(static, q, own, cache, where)[0]


type Sums = tuple[Float[Array, "I N rows V"], Float[Array, "I N rows"]]


def _forward(
    static: Static, q: Array, own: Block, cache: Block | None, where: Where
) -> tuple[tuple[Array, Array], Residuals]:
    def take(
        carry: tuple[Array, Array, Array], slab: Block, tokens: Tokens, index: Array
    ) -> tuple[Array, Array, Array]:
        out, left, visited = carry
        tiles = static.plan(where, tokens)
        tiles = _chosen(tiles, _is_open(static, tiles, left))
        out, left = _absorb(static, q, slab, tiles, (out, left))
        return out, left, put(visited, index, _listed(tiles))

    def visit(sums: Sums, block: Block, tokens: Tokens) -> tuple[Sums, Entry]:
        out, left = sums
        none = jnp.zeros((_num_slabs(static, tokens), q.shape[0]), bool)
        start = out, left, none
        size = static.blocks.block_kv
        out, after, visited = ring.take_slabs(size, block, tokens, take, start)
        return (out, after), Entry(left, visited)

    out, left, _ = chunked.begin(q, own.v.shape[-1], 0)
    at = lambda sums, block, step: visit(sums, block, where.of(static.shards, step))
    sums, entries = ring.near_to_far(static.shards, own, at, (out, left))
    last = None
    if cache is not None:
        sums, last = visit(sums, cache, where.cached)
    out, left = sums
    return (out, -left), Residuals(q, own, cache, where, entries, last)


def _absorb(static: Static, q: Array, slab: Block, tiles: Tiles, sums: Sums) -> Sums:
    # A slab is one tile per block of queries, so `left` before that tile is `left` at the entry.
    lefts = jnp.zeros((tiles.pairs.shape[0], *sums[1].shape[1:]), jnp.float32)
    given = chunked.Sums(*sums, lefts)
    out, left, _ = chunked.absorb(static.tiles, q, static.split(slab), tiles, given)
    return out, left


def _num_slabs(static: Static, tokens: Tokens) -> int:
    return -(-tokens.slot.shape[1] // static.blocks.block_kv)


def _is_open(static: Static, tiles: Tiles, left: Array) -> Bool[Array, " I"]:
    """Whether some row of each block of queries has so much left that the slab matters to it."""
    tolerance = static.tiles.tolerance
    enough = -math.log(tolerance) if tolerance else _NOTHING
    reaches = causal_tiles.farthest(tiles, static.tiles.parts) == 0
    return jnp.any((left < enough) & reaches, axis=(1, 2))


def _chosen(tiles: Tiles, of_block: Bool[Array, " I"]) -> Tiles:
    """The tiles of these blocks of queries."""
    return causal_tiles.keep(tiles, of_block[tiles.pairs[:, 0]])


def _listed(tiles: Tiles) -> Bool[Array, " I"]:
    """Which blocks of queries have a tile in the list."""
    number = tiles.pairs.shape[0]
    is_needed = jnp.arange(number) < tiles.needed
    return jnp.zeros((number,), bool).at[tiles.pairs[:, 0]].set(is_needed)


def _backward(
    static: Static, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Block, Block | None, None]:
    q, own, cache, where, entries, last = saved
    d_out, d_log_rem = cotangents
    size = static.blocks.block_kv

    def visit(
        carry: tuple[Array, Array], sums: Block, block: Block, tokens: Tokens, entry: Entry
    ) -> tuple[tuple[Array, Array], Block]:
        lefts = _lefts(static, q, block, tokens, where, entry)

        def pull(
            carry: tuple[Array, Array], slab: Block, tokens: Tokens, index: Array
        ) -> tuple[tuple[Array, Array], Block]:
            keys, back = jax.vjp(static.split, slab.wide())
            tiles = _chosen(static.plan(where, tokens), causal_tiles.block(entry.visited, index))
            here = causal_tiles.block(lefts, index)[tiles.pairs[:, 0]]
            carry, d_keys = chunked.pull(static.tiles, (q, d_out), keys, tiles, here, carry)
            return carry, *back(d_keys)

        return ring.pull_slabs(size, block, tokens, pull, (carry, sums))

    def at(
        carry: tuple[Array, Array], sums: Block, block: Block, step: Array
    ) -> tuple[tuple[Array, Array], Block]:
        entry = jax.tree.map(lambda x: causal_tiles.block(x, step), entries)
        # Else XLA may compute, for all steps, whatever depends only on entries, and keep it.
        entry, carry = lax.optimization_barrier((entry, carry))
        return visit(carry, sums, block, where.of(static.shards, step), entry)

    # d log rem / dz_l = -sigmoid(z_l) for every key, so it enters `flow` beyond the farthest key.
    carry, d_cache = (jnp.zeros_like(q), d_log_rem), None
    if cache is not None:
        assert last is not None
        carry, d_cache = visit(carry, cache.zeros(), cache, where.cached, last)
        d_cache = d_cache.like(cache)
    (d_q, _), d_own = ring.far_to_near(static.shards, own, at, carry)
    return d_q, d_own.like(own), d_cache, None


def _lefts(
    static: Static, q: Array, block: Block, tokens: Tokens, where: Where, entry: Entry
) -> Float[Array, "J I N rows"]:
    """`left` before each slab of a block."""

    def take(
        carry: tuple[Array, Array], slab: Block, tokens: Tokens, index: Array
    ) -> tuple[Array, Array]:
        left, lefts = carry
        tiles = _chosen(static.plan(where, tokens), causal_tiles.block(entry.visited, index))
        after = chunked.spend(static.tiles, q, static.split(slab), tiles, left)
        return after, put(lefts, index, left)

    start = (
        entry.left,
        jnp.broadcast_to(entry.left, (_num_slabs(static, tokens), *entry.left.shape)),
    )
    return ring.take_slabs(static.blocks.block_kv, block, tokens, take, start)[1]


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)

RING = Strategy("ring", _run, ring.sent, takes_all, ("contiguous",))
STRATEGIES = (gathered_keys.GATHER, head_exchange.ALL_TO_ALL, RING)
