"""Softmax attention over a split time axis. Either every rank gathers all keys and values, or it
gets all tokens of some heads, or it visits the blocks of all ranks in turn (`primitives.ring`).

The ring absorbs the blocks into one running softmax (m, l, o). Their order does not matter, so it
works for a zig-zag layout too. The backward pass recomputes each block from lse. Saved: the rank's
inputs, its output and lse. The ring always runs the tiles of `chunked`, whichever form is named:
the library forms cannot take or return an unfinished softmax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Attention
from kernels.contract import Op, Options, Strategy, takes_all
from kernels.letters import Inputs
from kernels.primitives import causal_tiles, gathered_keys, head_exchange, online_softmax, ring
from kernels.primitives.causal_tiles import Tiles
from kernels.primitives.kv_cache import CacheState, Tokens
from kernels.primitives.online_softmax import Running
from kernels.primitives.ring import Block, Where
from kernels.primitives.time_shards import LAYOUTS, Shards
from kernels.softmax import chunked
from kernels.softmax.chunked import Heads, Keys


class Static(NamedTuple):
    """What is known at trace time."""

    shards: Shards
    tiles: chunked.Static
    blocks: Attention
    heads: tuple[int, int]

    def plan(self, where: Where, tokens: Tokens) -> Tiles:
        """The tiles of this rank's queries on these keys."""
        return causal_tiles.between(where.own, tokens, self.heads, self.blocks, self.tiles.sight)

    def split(self, tokens: Tokens, block: Block) -> Keys:
        """The keys and values of a block, cut into tiles."""
        position = tokens.position if self.tiles.sight.apart else None
        return chunked.split_keys(self.tiles, *block, position, self.blocks.block_kv)


class Residuals(NamedTuple):
    """What the backward pass needs: inputs, output and lse."""

    q: Float[Array, "I N rows K"]
    own: Block
    cache: Block | None
    heads: Heads
    where: Where
    out: Float[Array, "I N rows V"]
    lse: Float[Array, "I N rows"]


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
    if options["block"]:
        where = where.subdivided(options["block"])
    blocks = ring.tiles(time)
    static = Static(shards, chunked.static_of(options, sparing=True), blocks, (num_heads, groups))
    position = where.own.position if static.tiles.sight.apart else None
    q_blocks = chunked.split_queries(q, position, options, groups, blocks.block_q)
    heads = chunked.spread(inputs, options, groups, blocks.block_q)
    out = attend(static, q_blocks, own, cache, heads, where)
    out = causal_tiles.merge_queries(out, batch, time, blocks.block_q)
    return segments.blank_padding(out, segment_ids).astype(q.dtype), after


def _attend(
    static: Static,
    q: Float[Array, "I N rows K"],
    own: Block,
    cache: Block | None,
    heads: Heads,
    where: Where,
) -> Float[Array, "I N rows V"]:
    """The output of blocked queries; slopes are constants."""
    return _forward(static, q, own, cache, heads, where)[0]


def _forward(
    static: Static, q: Array, own: Block, cache: Block | None, heads: Heads, where: Where
) -> tuple[Array, Residuals]:
    def take(running: Running, slab: Block, tokens: Tokens, _: Array) -> Running:
        keys, tiles = static.split(tokens, slab), static.plan(where, tokens)
        return chunked.absorb(static.tiles, q, keys, heads, tiles, running)

    def visit(running: Running, block: Block, step: Array) -> tuple[Running, None]:
        tokens = where.of(static.shards, step)
        return ring.take_slabs(static.blocks.block_kv, block, tokens, take, running), None

    running = chunked.begin(static.tiles, q, heads, own.v.shape[-1])
    running, _ = ring.near_to_far(static.shards, own, visit, running)
    if cache is not None:
        running = ring.take_slabs(static.blocks.block_kv, cache, where.cached, take, running)
    out, lse = online_softmax.finish(running)
    return out, Residuals(q, own, cache, heads, where, out, lse)


def _backward(
    static: Static, saved: Residuals, d_out: Array
) -> tuple[Array, Block, Block | None, Heads, None]:
    q, own, cache, heads, where, out, lse = saved
    known = chunked.queries(q, out, lse, d_out)

    def pull(d_q: Array, slab: Block, tokens: Tokens, _: Array) -> tuple[Array, Block]:
        keys, back = jax.vjp(partial(static.split, tokens), slab.wide())
        tiles = static.plan(where, tokens)
        d_q, d_keys = chunked.pull(static.tiles, known, keys, heads, tiles, d_q)
        return d_q, *back(d_keys)

    def visit(d_q: Array, sums: Block, block: Block, step: Array) -> tuple[Array, Block]:
        tokens = where.of(static.shards, step)
        return ring.pull_slabs(static.blocks.block_kv, block, tokens, pull, (d_q, sums))

    d_q, d_cache = jnp.zeros_like(q), None
    if cache is not None:
        start = d_q, cache.zeros()
        d_q, d_cache = ring.pull_slabs(static.blocks.block_kv, cache, where.cached, pull, start)
        d_cache = d_cache.like(cache)
    d_q, d_own = ring.far_to_near(static.shards, own, visit, d_q)
    return d_q, d_own.like(own), d_cache, chunked.pull_heads(heads, known), None


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)

RING = Strategy("ring", _run, ring.sent, takes_all, LAYOUTS)
STRATEGIES = (gathered_keys.GATHER, head_exchange.ALL_TO_ALL, RING)
