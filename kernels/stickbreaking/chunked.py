"""Stick-breaking attention tile by tile in plain XLA for any backend, with a hand-written backward.

Forward, every block of queries visits the blocks of keys from the nearest to the farthest and
carries `left`, the sum of softplus so far (log of the stick that is left, negated). Backward, it
visits them from the farthest to the nearest and carries `flow`. `left` is saved for every tile. It
is not recovered by subtracting from the total: where the total is large, that would cancel the
digits that matter. Saved: inputs, log rem, and `left`: T S / block_kv floats per head. No array has
T x T elements.

With a tolerance, a block of queries (of one row of the batch and one key head) stops at the first
block of keys after which no row has more than the tolerance left. All farther keys together would
add at most that share of the largest value. The visited tiles are listed, and the backward pass
walks that list. So its gradient is exactly that of the computed function, which does not see the
farther keys.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Attention
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import causal_tiles, kv_cache, log_space
from kernels.primitives.causal_tiles import Sight, Tiles, add, block, put
from kernels.primitives.kv_cache import CacheState
from kernels.stickbreaking import tile


class Static(NamedTuple):
    """What is known at trace time; `sparing`: see `causal_tiles.transposed`."""

    sight: Sight
    run: int
    tolerance: float
    parts: int
    sparing: bool


class Keys(NamedTuple):
    """Blocks of keys and values."""

    k: Float[Array, "J N block K"]
    v: Float[Array, "J N block V"]


class Residuals(NamedTuple):
    """What the backward pass needs: blocked inputs, the visited tiles, and `left` before each."""

    q: Float[Array, "I N rows K"]
    keys: Keys
    tiles: Tiles
    left: Float[Array, "P N rows"]


class Sums(NamedTuple):
    """What is carried along the tiles: the output, `left` now, and `left` before each tile."""

    out: Float[Array, "I N rows V"]
    left: Float[Array, "I N rows"]
    lefts: Float[Array, "P N rows"]


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
    batch = q.shape[0]
    sight = Sight(strict=not options["attend_current"])
    # Each row of the batch and key head by itself: one that looks far does not hold up the others.
    parts = batch * placed.k.shape[2] if options["tolerance"] else 1
    cut = causal_tiles.cut(q, placed, blocks, scale=options["scale"], sight=sight, parts=parts)
    static = Static(sight, cut.blocks.run, options["tolerance"], parts, sparing=False)
    out, log_rem = attend(static, cut.q, Keys(cut.k, cut.v), cut.tiles)
    out = merge(out, log_rem, inputs, options, cut.blocks.block_q, parts)
    return segments.blank_padding(out, placed.q_segment).astype(q.dtype), placed.state


def merge(
    out: Float[Array, "I N rows V"],
    log_rem: Float[Array, "I N rows"],
    inputs: Inputs,
    options: Options,
    block_q: int,
    parts: int,
) -> Float[Array, "B T H V"]:
    """The output of all queries, with the remainder's share added."""
    batch, time = inputs["q"].shape[:2]
    out, log_rem = (causal_tiles.unpart(x, parts) for x in (out, log_rem))
    out = causal_tiles.merge_queries(out, batch, time, block_q)
    if options["remainder"] == "none":
        return out
    log_rem = causal_tiles.merge_queries(log_rem[..., None], batch, time, block_q)
    return out + jnp.exp(log_rem) * tile.rest(inputs, options)


def _attend(
    static: Static, q: Float[Array, "I N rows K"], keys: Keys, tiles: Tiles
) -> tuple[Float[Array, "I N rows V"], Float[Array, "I N rows"]]:
    """The output before the remainder, and log rem, of blocked queries."""
    return _forward(static, q, keys, tiles)[0]


def begin(q: Array, width: int, num_tiles: int) -> Sums:
    """The sums of queries that have seen no key; values have this width."""
    out = jnp.zeros((*q.shape[:-1], width), jnp.float32)
    left = jnp.zeros(q.shape[:-1], jnp.float32)
    return Sums(out, left, jnp.zeros((num_tiles, *left.shape[1:]), jnp.float32))


def absorb(static: Static, q: Array, keys: Keys, tiles: Tiles, sums: Sums) -> Sums:
    """The sums after the needed tiles of these keys, which must be the next farther ones."""
    visit = _visitor(static, q, keys, tiles)
    step = lambda n, sums: visit(block(tiles.pairs, n), n, sums)[0]
    return lax.fori_loop(0, tiles.needed, step, sums)


def _logits(
    static: Static, q: Array, k_t: Array, tiles: Tiles, pair: tuple[Array, Array]
) -> Float[Array, "N rows block"]:
    """The masked logits of a tile; `k_t` are the transposed keys."""
    i, j = pair
    seen = causal_tiles.mask(tiles, i, j, static.sight)
    return tile.mask(block(q, i) @ block(k_t, j), seen)


def spend(static: Static, q: Array, keys: Keys, tiles: Tiles, left: Array) -> Array:
    """Only `left` after the needed tiles of these keys."""
    k_t = jnp.swapaxes(keys.k, -1, -2)

    def visit(step: Array, left: Array) -> Array:
        i, j = block(tiles.pairs, step)
        broken, _ = log_space.softplus_and_exp(_logits(static, q, k_t, tiles, (i, j)))
        return add(left, i, log_space.suffix_sum(broken, static.run)[1])

    return lax.fori_loop(0, tiles.needed, visit, left)


def _visitor(
    static: Static, q: Array, keys: Keys, tiles: Tiles
) -> Callable[[Array, Array, Sums], tuple[Sums, Array]]:
    """A function `visit(pair, place, sums)` that adds one tile. `place` is the tile's index in
    `lefts`. It returns the sums, and `left` of the tile's block of queries after the tile.
    """
    k_t = jnp.swapaxes(keys.k, -1, -2)

    def visit(pair: Array, place: Array, sums: Sums) -> tuple[Sums, Array]:
        i, j = pair
        here, z = block(sums.left, i), _logits(static, q, k_t, tiles, (i, j))
        broken, _ = log_space.softplus_and_exp(z)
        nearer, total = log_space.suffix_sum(broken, static.run)
        weights = tile.weigh(z - broken, nearer + here[..., None], jnp.exp)
        out = add(sums.out, i, weights @ block(keys.v, j))
        after = here + total
        return Sums(out, put(sums.left, i, after), put(sums.lefts, place, here)), after

    return visit


def _forward(
    static: Static, q: Array, keys: Keys, tiles: Tiles
) -> tuple[tuple[Array, Array], Residuals]:
    sums = begin(q, keys.v.shape[-1], tiles.pairs.shape[0])
    if static.tolerance:
        visit = _visitor(static, q, keys, tiles)
        sums, tiles = _until_used_up(static, tiles, visit, sums)
    else:
        sums = absorb(static, q, keys, tiles, sums)
    return (sums.out, -sums.left), Residuals(q, keys, tiles, sums.lefts)


def _until_used_up(
    static: Static, tiles: Tiles, visit: Callable[..., tuple[Sums, Array]], sums: Sums
) -> tuple[Sums, Tiles]:
    """Visits the tiles of each block of queries until its sticks are used up, and lists them."""
    ends, farthest = causal_tiles.ends(tiles), causal_tiles.farthest(tiles, static.parts)
    enough = -math.log(static.tolerance)

    def step(carry: tuple[Array, Array, Array, Sums]) -> tuple[Array, Array, Array, Sums]:
        step, count, visited, sums = carry
        pair = block(tiles.pairs, step)
        sums, left = visit(pair, count, sums)
        # A row whose document begins in this block of keys gains nothing from farther ones.
        goes_on = jnp.any((left < enough) & (block(farthest, pair[0]) < pair[1] // static.parts))
        step = jnp.where(goes_on, step + 1, block(ends, step))
        return step, count + 1, put(visited, count, pair), sums

    zero = jnp.int32(0)
    start = zero, zero, jnp.zeros_like(tiles.pairs), sums
    _, count, visited, sums = lax.while_loop(lambda carry: carry[0] < tiles.needed, step, start)
    return sums, tiles._replace(pairs=visited, needed=count)


def pull(
    static: Static,
    queries: tuple[Array, Array],
    keys: Keys,
    tiles: Tiles,
    lefts: Array,
    carry: tuple[Array, Array],
) -> tuple[tuple[Array, Array], Keys]:
    """The cotangents from the needed tiles of these keys, which must be the next nearer ones: d_q
    and `flow`, with theirs added, and the keys'. `queries` are q and d_out.
    """
    q, d_out = queries
    k_t, v_t = (jnp.swapaxes(x, -1, -2) for x in keys)
    q_t, d_out_t = (causal_tiles.transposed(x, sparing=static.sparing) for x in queries)

    def visit(back: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_q, flow, d_k_t, d_v_t = carry
        step = tiles.needed - 1 - back
        i, j = block(tiles.pairs, step)
        z = _logits(static, q, k_t, tiles, (i, j))
        broken, u = log_space.softplus_and_exp(z)
        nearer, _ = log_space.suffix_sum(broken, static.run)
        weights = tile.weigh(z - broken, nearer + block(lefts, step)[..., None], jnp.exp)
        moved = weights * (block(d_out, i) @ block(v_t, j))
        here = block(flow, i)
        farther, total = log_space.prefix_sum(moved, static.run)
        d_z = tile.logit_cotangent(moved, *log_space.sigmoids(z, u), farther + here[..., None])
        d_q = add(d_q, i, d_z @ block(keys.k, j))
        d_k_t = add(d_k_t, j, q_t(i) @ d_z)
        d_v_t = add(d_v_t, j, d_out_t(i) @ weights)
        return d_q, put(flow, i, here + total), d_k_t, d_v_t

    start = (*carry, jnp.zeros_like(k_t), jnp.zeros_like(v_t))
    d_q, flow, d_k_t, d_v_t = lax.fori_loop(0, tiles.needed, visit, start)
    return (d_q, flow), Keys(jnp.swapaxes(d_k_t, -1, -2), jnp.swapaxes(d_v_t, -1, -2))


def _backward(
    static: Static, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Keys, None]:
    q, keys, tiles, lefts = saved
    d_out, d_log_rem = cotangents
    # d log rem / dz_l = -sigmoid(z_l) for every key, so it enters `flow` beyond the farthest key.
    start = jnp.zeros_like(q), d_log_rem
    (d_q, _), d_keys = pull(static, (q, d_out), keys, tiles, lefts, start)
    return d_q, d_keys, None


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
