"""Softmax attention tile by tile in plain XLA, for any backend, with its own backward.

The order of FlashAttention-2 (Dao, arXiv 2307.08691): for every block of queries the softmax over
key blocks is kept running; the backward pass recomputes each tile from lse. Saved: inputs, output
and lse; no array has T x T elements. A sink is where the running sum starts: m = sink, l = 1.

With a distance ceiling, pairs within the window and pairs beyond it are two kinds of tile, (i, j)
and (I + i, J + j): the second half of q is turned by the ceiling, that of k not at all. Every pair
is in one kind, so the softmax runs over both; only blocks that hold a document's first tokens have
tiles of the second kind. Rotations are outside of the loop, and so are their transposes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Attention
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import causal_tiles, kv_cache, online_softmax, rope
from kernels.primitives.causal_tiles import Sight, Tiles, add, block, put
from kernels.primitives.kv_cache import CacheState, Placed
from kernels.primitives.online_softmax import MASKED, Running
from kernels.softmax import tile


class Static(NamedTuple):
    """What is known at trace time."""

    sight: Sight
    cap: float


class Heads(NamedTuple):
    """Numbers of each head, for every row of a block: ALiBi slopes, sinks."""

    slopes: Float[Array, "N rows"] | None
    sinks: Float[Array, "N rows"] | None


class Residuals(NamedTuple):
    """What the backward pass needs: blocked inputs, output and lse.

    With pairs beyond the window apart, q and k have twice as many blocks as out and v.
    """

    q: Float[Array, "I N rows K"]
    k: Float[Array, "J N block K"]
    v: Float[Array, "J N block V"]
    heads: Heads
    tiles: Tiles
    out: Float[Array, "I N rows V"]
    lse: Float[Array, "I N rows"]


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
    batch, time = q.shape[:2]
    ceiling = options["distance_ceiling"]
    sight = Sight(False, options["window"], options["global_tokens"], apart=ceiling > 0)
    where = kv_cache.subdivide(placed, options["block"]) if options["block"] else placed
    turned = _turn_near(q, where, options) if ceiling else (q, where)
    cut = causal_tiles.cut(*turned, blocks, scale=options["scale"], sight=sight)
    block_q, num_heads, groups = cut.blocks.block_q, q.shape[2], placed.k.shape[2]

    def spread(x: Float[Array, " H"]) -> Float[Array, "N rows"]:
        wide = jnp.broadcast_to(x.astype(jnp.float32)[:, None], (batch, block_q, num_heads, 1))
        return causal_tiles.split_queries(wide, groups, block_q)[0, ..., 0]

    heads = Heads(
        spread(inputs["alibi_slopes"]) if options["alibi"] else None,
        spread(inputs["sink"]) if options["sink"] else None,
    )
    q_blocks, k_blocks = cut.q, cut.k
    if ceiling:
        far = jnp.full((1, 1), ceiling, jnp.int32)
        q_far = rope.rotate(q.astype(jnp.float32), far, theta=options["rope_theta"])
        q_far = causal_tiles.split_queries(q_far * options["scale"], groups, block_q)
        k_far = causal_tiles.split_keys(placed.k.astype(jnp.float32), cut.blocks.block_kv)
        q_blocks, k_blocks = jnp.concatenate([cut.q, q_far]), jnp.concatenate([cut.k, k_far])
    out = attend(
        Static(sight, options["logits_soft_cap"]), q_blocks, k_blocks, cut.v, heads, cut.tiles
    )
    out = causal_tiles.merge_queries(out, batch, time, block_q)
    return segments.blank_padding(out, placed.q_segment).astype(q.dtype), placed.state


def _turn_near(q: Array, where: Placed, options: Options) -> tuple[Array, Placed]:
    """Queries and keys turned by their positions, for pairs within the window."""
    q_position, kv_position = kv_cache.positions(where)
    turn = partial(rope.rotate, theta=options["rope_theta"])
    k = turn(where.k.astype(jnp.float32), kv_position)
    return turn(q.astype(jnp.float32), q_position), where._replace(k=k)


def _attend(
    static: Static,
    q: Float[Array, "I N rows K"],
    k: Float[Array, "J N block K"],
    v: Float[Array, "J N block V"],
    heads: Heads,
    tiles: Tiles,
) -> Float[Array, "I N rows V"]:
    """Output of blocked queries; slopes are constants."""
    return _forward(static, q, k, v, heads, tiles)[0]


def _place(static: Static, tiles: Tiles, step: Array) -> tuple[Array, Array, Array, Array]:
    """Blocks (i, j) of q and k in a tile, and those of out and v that belong to them."""
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


def _forward(
    static: Static, q: Array, k: Array, v: Array, heads: Heads, tiles: Tiles
) -> tuple[Array, Residuals]:
    k_t = jnp.swapaxes(k, -1, -2)

    def visit(step: Array, running: Running) -> Running:
        _, _, row, column = _place(static, tiles, step)
        logits = _score(static, q, k_t, heads, tiles, step).logits
        here = Running(*(block(x, row) for x in running))
        fresh = online_softmax.update(here, logits, block(v, column))
        return Running(*(put(x, row, new) for x, new in zip(running, fresh, strict=True)))

    rows = (tiles.q_slot.shape[0], *q.shape[1:-1])
    maximum, total = jnp.full(rows, MASKED), jnp.zeros(rows)
    if heads.sinks is not None:
        maximum, total = jnp.broadcast_to(heads.sinks, rows), jnp.ones(rows)
    start = Running(maximum, total, jnp.zeros((*rows, v.shape[-1]), jnp.float32))
    out, lse = online_softmax.finish(lax.fori_loop(0, tiles.needed, visit, start))
    return out, Residuals(q, k, v, heads, tiles, out, lse)


def _backward(
    static: Static, saved: Residuals, d_out: Array
) -> tuple[Array, Array, Array, Heads, None]:
    q, k, v, heads, tiles, out, lse = saved
    delta = jnp.sum(out * d_out, axis=-1)
    # Transposed once here, every product of the loop is a plain row-major one.
    k_t, v_t, q_t, d_out_t = (jnp.swapaxes(x, -1, -2) for x in (k, v, q, d_out))

    def visit(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k_t, d_v_t = carry
        i, j, row, column = _place(static, tiles, step)
        scored = _score(static, q, k_t, heads, tiles, step)
        weights = jnp.exp(scored.logits - block(lse, row)[..., None])
        d_weights = block(d_out, row) @ block(v_t, column)
        d_logits = tile.logit_cotangent(scored, weights, d_weights, block(delta, row))
        d_q = add(d_q, i, d_logits @ block(k, j))
        d_k_t = add(d_k_t, j, block(q_t, i) @ d_logits)
        return d_q, d_k_t, add(d_v_t, column, block(d_out_t, row) @ weights)

    start = (jnp.zeros_like(q), jnp.zeros_like(k_t), jnp.zeros_like(v_t))
    d_q, d_k_t, d_v_t = lax.fori_loop(0, tiles.needed, visit, start)
    d_slopes = None if heads.slopes is None else jnp.zeros_like(heads.slopes)
    d_sinks = None
    if heads.sinks is not None:
        # A sink is a key whose value is zero: dA = 0, so ds = -A delta.
        d_sinks = -jnp.sum(jnp.exp(heads.sinks - lse) * delta, axis=0)
    d_k, d_v = jnp.swapaxes(d_k_t, -1, -2), jnp.swapaxes(d_v_t, -1, -2)
    return d_q, d_k, d_v, Heads(d_slopes, d_sinks), None


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
