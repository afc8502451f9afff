"""Softmax attention tile by tile in plain XLA, for any backend, with its own backward.

The order of FlashAttention-2 (Dao, arXiv 2307.08691): for every block of queries the softmax over
key blocks is kept running; the backward pass recomputes each tile from lse. Saved: inputs, output
and lse; no array has T x T elements.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Attention
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import causal_tiles, kv_cache, online_softmax
from kernels.primitives.causal_tiles import Tiles, add, block, put
from kernels.primitives.kv_cache import CacheState
from kernels.primitives.online_softmax import MASKED, Running
from kernels.softmax import tile


class Static(NamedTuple):
    """What is known at trace time."""

    window: int
    cap: float


class Residuals(NamedTuple):
    """What the backward pass needs: blocked inputs, output and lse."""

    q: Float[Array, "I N rows K"]
    k: Float[Array, "J N block K"]
    v: Float[Array, "J N block V"]
    slopes: Float[Array, "N rows"] | None
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
    batch, time, heads, _ = q.shape
    static = Static(options["window"], options["logits_soft_cap"])
    cut = causal_tiles.cut(
        q, placed, blocks, scale=options["scale"], strict=False, window=static.window
    )
    block_q, slopes = cut.blocks.block_q, None
    if options["alibi"]:
        wide = jnp.broadcast_to(inputs["alibi_slopes"][:, None], (batch, block_q, heads, 1))
        slopes = causal_tiles.split_queries(wide, placed.k.shape[2], block_q)[0, ..., 0]
    out = attend(static, cut.q, cut.k, cut.v, slopes, cut.tiles)
    out = causal_tiles.merge_queries(out, batch, time, block_q)
    return segments.blank_padding(out, placed.q_segment).astype(q.dtype), placed.state


def _attend(
    static: Static,
    q: Float[Array, "I N rows K"],
    k: Float[Array, "J N block K"],
    v: Float[Array, "J N block V"],
    slopes: Float[Array, "N rows"] | None,
    tiles: Tiles,
) -> Float[Array, "I N rows V"]:
    """Output of blocked queries; `slopes` are constants."""
    return _forward(static, q, k, v, slopes, tiles)[0]


def _score(
    static: Static, q: Array, k_t: Array, slopes: Array | None, tiles: Tiles, step: Array
) -> tile.Logits:
    i, j = block(tiles.pairs, step)
    seen = causal_tiles.mask(tiles, i, j, strict=False, window=static.window)
    bias = None
    if slopes is not None:
        distance = block(tiles.q_slot, i)[..., :, None] - block(tiles.kv_slot, j)[..., None, :]
        bias = slopes[..., None] * distance
    return tile.score(block(q, i), block(k_t, j), seen, bias, static.cap)


def _forward(
    static: Static, q: Array, k: Array, v: Array, slopes: Array | None, tiles: Tiles
) -> tuple[Array, Residuals]:
    k_t = jnp.swapaxes(k, -1, -2)

    def visit(step: Array, running: Running) -> Running:
        i, j = block(tiles.pairs, step)
        logits = _score(static, q, k_t, slopes, tiles, step).logits
        fresh = online_softmax.update(Running(*(block(x, i) for x in running)), logits, block(v, j))
        return Running(*(put(x, i, new) for x, new in zip(running, fresh, strict=True)))

    rows = q.shape[:-1]
    start = Running(
        jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1]), jnp.float32)
    )
    out, lse = online_softmax.finish(lax.fori_loop(0, tiles.needed, visit, start))
    return out, Residuals(q, k, v, slopes, tiles, out, lse)


def _backward(
    static: Static, saved: Residuals, d_out: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, slopes, tiles, out, lse = saved
    delta = jnp.sum(out * d_out, axis=-1)
    # Transposed once here, every product of the loop is a plain row-major one.
    k_t, v_t, q_t, d_out_t = (jnp.swapaxes(x, -1, -2) for x in (k, v, q, d_out))

    def visit(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k_t, d_v_t = carry
        i, j = block(tiles.pairs, step)
        scored = _score(static, q, k_t, slopes, tiles, step)
        weights = jnp.exp(scored.logits - block(lse, i)[..., None])
        d_weights = block(d_out, i) @ block(v_t, j)
        d_logits = tile.logit_cotangent(scored, weights, d_weights, block(delta, i))
        d_q = add(d_q, i, d_logits @ block(k, j))
        d_k_t = add(d_k_t, j, block(q_t, i) @ d_logits)
        return d_q, d_k_t, add(d_v_t, j, block(d_out_t, i) @ weights)

    start = (jnp.zeros_like(q), jnp.zeros_like(k_t), jnp.zeros_like(v_t))
    d_q, d_k_t, d_v_t = lax.fori_loop(0, tiles.needed, visit, start)
    return d_q, jnp.swapaxes(d_k_t, -1, -2), jnp.swapaxes(d_v_t, -1, -2), None, None


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
