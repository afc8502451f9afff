"""Softmax attention tile by tile in plain XLA, for any backend, with a hand-written backward.

The order is that of FlashAttention-2 (Dao, arXiv 2307.08691): every block of queries keeps a
running softmax over the blocks of keys, and the backward pass recomputes each tile from lse. Saved:
inputs, output and lse. No array has T x T elements. A sink is the start of the running sum: m =
sink, l = 1.

With a distance ceiling, pairs within the window and pairs beyond it are two kinds of tile, (i, j)
and (I + i, J + j) (`causal_tiles`, `apart`). So q and k have twice as many blocks: in the first
half both are rotated by their positions; in the second half q is rotated by the ceiling and k not
at all. Every pair belongs to one kind, so one softmax covers both. Only blocks that hold a
document's first tokens have tiles of the second kind. Rotations happen outside the loop, and so do
their transposes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Attention, attention
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import causal_tiles, kv_cache, online_softmax, rope
from kernels.primitives.causal_tiles import Sight, Tiles, add, block, put
from kernels.primitives.kv_cache import CacheState
from kernels.primitives.online_softmax import MASKED, Running
from kernels.softmax import tile


class Static(NamedTuple):
    """What is known at trace time. `theta` is the base of the rotation by positions, used where
    pairs beyond the window are apart; `sparing`: see `causal_tiles.transposed`.
    """

    sight: Sight
    cap: float
    theta: float
    sparing: bool


class Heads(NamedTuple):
    """One number per head, repeated for every row of a block: ALiBi slopes, sinks."""

    slopes: Float[Array, "N rows"] | None
    sinks: Float[Array, "N rows"] | None


class Keys(NamedTuple):
    """Blocks of keys and values. With `apart` there are twice as many blocks of keys."""

    k: Float[Array, "J N block K"]
    v: Float[Array, "J N block V"]


class Residuals(NamedTuple):
    """What the backward pass needs: blocked inputs, output and lse.

    With `apart`, q and k have twice as many blocks as out and v.
    """

    q: Float[Array, "I N rows K"]
    keys: Keys
    heads: Heads
    tiles: Tiles
    out: Float[Array, "I N rows V"]
    lse: Float[Array, "I N rows"]


class Queries(NamedTuple):
    """Blocks of queries in the backward pass, and what is known about their outputs."""

    q: Float[Array, "I N rows K"]
    d_out: Float[Array, "I N rows V"]
    lse: Float[Array, "I N rows"]
    delta: Float[Array, "I N rows"]


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: CacheState | None,
    *,
    options: Options,
    blocks: Attention | None = None,
) -> tuple[Float[Array, "B T H V"], CacheState]:
    """Output and state of T more tokens."""
    q = inputs["q"]
    placed = kv_cache.place(inputs["k"], inputs["v"], segment_ids, state)
    batch, time, num_heads = q.shape[:3]
    source, groups = placed.k.shape[1:3]
    blocks = (blocks or attention(time, source)).fit(time, source)
    static = static_of(options, sparing=False)
    where = kv_cache.subdivide(placed, options["block"]) if options["block"] else placed
    q_position, kv_position = kv_cache.positions(where) if static.sight.apart else (None, None)
    out = attend(
        static,
        split_queries(q, q_position, options, groups, blocks.block_q),
        split_keys(static, placed.k, placed.v, kv_position, blocks.block_kv),
        spread(inputs, options, groups, blocks.block_q),
        causal_tiles.plan(where, (time, num_heads), blocks, static.sight),
    )
    out = causal_tiles.merge_queries(out, batch, time, blocks.block_q)
    return segments.blank_padding(out, placed.q_segment).astype(q.dtype), placed.state


def static_of(options: Options, *, sparing: bool) -> Static:
    """The static part of a problem with these options."""
    apart = options["distance_ceiling"] > 0
    sight = Sight(False, options["window"], options["global_tokens"], apart=apart)
    return Static(sight, options["logits_soft_cap"], options["rope_theta"], sparing)


def split_queries(
    q: Float[Array, "B T H K"],
    position: Int[Array, "#B T"] | None,
    options: Options,
    groups: int,
    block_q: int,
) -> Float[Array, "I N rows K"]:
    """Queries times the scale, in float32 blocks. With a ceiling there are two sets: for pairs
    within the window, rotated by their positions, and then for pairs beyond it, by the ceiling.
    """
    split = lambda x: causal_tiles.split_queries(x * options["scale"], groups, block_q)
    q = q.astype(jnp.float32)
    if position is None:
        return split(q)
    turn = partial(rope.rotate, q, theta=options["rope_theta"])
    far = jnp.full((1, 1), options["distance_ceiling"], jnp.int32)
    return jnp.concatenate([split(turn(position)), split(turn(far))])


def split_keys(
    static: Static,
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    position: Int[Array, "#B S"] | None,
    block_kv: int,
) -> Keys:
    """Keys and values, in float32 blocks. With a ceiling there are two sets of keys: rotated by
    their positions, and then as they are.
    """
    split = lambda x: causal_tiles.split_keys(x.astype(jnp.float32), block_kv)
    if position is None:
        return Keys(split(k), split(v))
    near = rope.rotate(k.astype(jnp.float32), position, theta=static.theta)
    return Keys(jnp.concatenate([split(near), split(k)]), split(v))


def spread(inputs: Inputs, options: Options, groups: int, block_q: int) -> Heads:
    """Slopes and sinks, repeated for the rows of a block."""
    batch, _, num_heads = inputs["q"].shape[:3]

    def rows(x: Float[Array, " H"]) -> Float[Array, "N rows"]:
        wide = jnp.broadcast_to(x.astype(jnp.float32)[:, None], (batch, block_q, num_heads, 1))
        return causal_tiles.split_queries(wide, groups, block_q)[0, ..., 0]

    return Heads(
        rows(inputs["alibi_slopes"]) if options["alibi"] else None,
        rows(inputs["sink"]) if options["sink"] else None,
    )


def _attend(
    static: Static, q: Float[Array, "I N rows K"], keys: Keys, heads: Heads, tiles: Tiles
) -> Float[Array, "I N rows V"]:
    """The output of blocked queries; slopes are constants."""
    return _forward(static, q, keys, heads, tiles)[0]


def _place(static: Static, tiles: Tiles, step: Array) -> tuple[Array, Array, Array, Array]:
    """The blocks (i, j) of q and k for a tile, and the blocks of out and v that belong to them."""
    i, j = block(tiles.pairs, step)
    if not static.sight.apart:
        return i, j, i, j
    return i, j, i % tiles.q_slot.shape[0], j % tiles.kv_slot.shape[0]


def _score(
    static: Static, q: Array, k_t: Array, heads: Heads, tiles: Tiles, step: Array
) -> tile.Logits:
    i, j, row, column = _place(static, tiles, step)
    seen = causal_tiles.mask(tiles, i, j, static.sight)
    bias = None
    if heads.slopes is not None:
        distance = block(tiles.q_slot, row)[..., :, None]
        distance = distance - block(tiles.kv_slot, column)[..., None, :]
        bias = heads.slopes[..., None] * distance
    return tile.score(block(q, i) @ block(k_t, j), seen, bias, static.cap)


def begin(static: Static, q: Array, heads: Heads, width: int) -> Running:
    """The running softmax of queries that have seen no key; values have this width."""
    rows = (q.shape[0] // (1 + static.sight.apart), *q.shape[1:-1])
    maximum, total = jnp.full(rows, MASKED), jnp.zeros(rows)
    if heads.sinks is not None:
        maximum, total = jnp.broadcast_to(heads.sinks, rows), jnp.ones(rows)
    return Running(maximum, total, jnp.zeros((*rows, width), jnp.float32))


def absorb(
    static: Static, q: Array, keys: Keys, heads: Heads, tiles: Tiles, running: Running
) -> Running:
    """The running softmax after the needed tiles of these keys, which may be some of all keys."""
    k_t = jnp.swapaxes(keys.k, -1, -2)

    def visit(step: Array, running: Running) -> Running:
        _, _, row, column = _place(static, tiles, step)
        logits = _score(static, q, k_t, heads, tiles, step).logits
        here = Running(*(block(x, row) for x in running))
        fresh = online_softmax.update(here, logits, block(keys.v, column))
        return Running(*(put(x, row, new) for x, new in zip(running, fresh, strict=True)))

    return lax.fori_loop(0, tiles.needed, visit, running)


def _forward(
    static: Static, q: Array, keys: Keys, heads: Heads, tiles: Tiles
) -> tuple[Array, Residuals]:
    running = begin(static, q, heads, keys.v.shape[-1])
    out, lse = online_softmax.finish(absorb(static, q, keys, heads, tiles, running))
    return out, Residuals(q, keys, heads, tiles, out, lse)


def queries(q: Array, out: Array, lse: Array, d_out: Array) -> Queries:
    """What the backward pass knows about the queries."""
    return Queries(q, d_out, lse, jnp.sum(out * d_out, axis=-1))


def pull(
    static: Static, known: Queries, keys: Keys, heads: Heads, tiles: Tiles, d_q: Array
) -> tuple[Array, Keys]:
    """The cotangents from the needed tiles of these keys: d_q, with theirs added, and the keys'."""
    q, d_out, lse, delta = known
    k_t, v_t = (jnp.swapaxes(x, -1, -2) for x in keys)
    q_t, d_out_t = (causal_tiles.transposed(x, sparing=static.sparing) for x in (q, d_out))

    def visit(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k_t, d_v_t = carry
        i, j, row, column = _place(static, tiles, step)
        scored = _score(static, q, k_t, heads, tiles, step)
        weights = jnp.exp(scored.logits - block(lse, row)[..., None])
        d_weights = block(d_out, row) @ block(v_t, column)
        d_logits = tile.logit_cotangent(scored, weights, d_weights, block(delta, row))
        d_q = add(d_q, i, d_logits @ block(keys.k, j))
        d_k_t = add(d_k_t, j, q_t(i) @ d_logits)
        return d_q, d_k_t, add(d_v_t, column, d_out_t(row) @ weights)

    start = (d_q, jnp.zeros_like(k_t), jnp.zeros_like(v_t))
    d_q, d_k_t, d_v_t = lax.fori_loop(0, tiles.needed, visit, start)
    return d_q, Keys(jnp.swapaxes(d_k_t, -1, -2), jnp.swapaxes(d_v_t, -1, -2))


def pull_heads(heads: Heads, known: Queries) -> Heads:
    """The cotangents of slopes (zero: they are constants) and of sinks."""
    d_slopes = None if heads.slopes is None else jnp.zeros_like(heads.slopes)
    if heads.sinks is None:
        return Heads(d_slopes, None)
    # A sink is a key whose value is zero: dA = 0, so ds = -A delta.
    return Heads(d_slopes, -jnp.sum(jnp.exp(heads.sinks - known.lse) * known.delta, axis=0))


def _backward(static: Static, saved: Residuals, d_out: Array) -> tuple[Array, Keys, Heads, None]:
    q, keys, heads, tiles, out, lse = saved
    known = queries(q, out, lse, d_out)
    d_q, d_keys = pull(static, known, keys, heads, tiles, jnp.zeros_like(q))
    return d_q, d_keys, pull_heads(heads, known), None


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
