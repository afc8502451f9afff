"""Softmax attention by JAX's splash attention, a Pallas kernel for TPUs.

The library takes one row of the batch, [heads, T, width], with a causal mask or a window that is
known at trace time, and with documents. It neither computes nor fetches blocks of keys that the
mask hides, but it does compute those of other documents. A carried cache is put before the new
tokens, and its rows are moved to the right, so that slots are indices again:

    keys    [.. empty .. | tokens of the cache | new tokens]        query t is at index S + t

For its backward pass the library saves the inputs, the output, and 128 copies of lse.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Attention, round_up
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import device, kv_cache
from kernels.primitives.kv_cache import CacheState

LANES = 128
DEFAULT = Attention(512, 512, LANES)
CANDIDATES = tuple(Attention(q, kv, LANES) for q in (256, 512, 1024) for kv in (256, 512, 1024))


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: CacheState | None,
    *,
    options: Options,
    blocks: Attention | None = None,
) -> tuple[Float[Array, "B T H V"], CacheState]:
    """Output and state of T more tokens.

    Raises:
      ValueError: the blocks do not fill whole rows of lanes.
    """
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    time = q.shape[1]
    placed = kv_cache.place(k, v, segment_ids, state)
    where = kv_cache.subdivide(placed, options["block"]) if options["block"] else placed
    q_ids, kv_ids = where.q_segment, where.q_segment
    if state is not None:
        assert q_ids is not None
        assert where.kv_segment is not None
        capacity = state.k.shape[1]
        length = jnp.minimum(state.length, capacity)[:, None]
        slot = (jnp.arange(capacity, dtype=jnp.int32) + length) % capacity
        before = jnp.where(slot < length, jnp.take_along_axis(where.kv_segment, slot, axis=1), 0)
        # Tokens that the cache has no room for are dropped, and no query sees them.
        assert placed.q_segment is not None
        fits = segments.slots(placed.q_segment, state.length) < capacity
        kv_ids = jnp.concatenate([before, jnp.where(fits, q_ids, 0)], axis=1)
        k, v = (
            jnp.concatenate([_take(old, slot), new.astype(old.dtype)], axis=1)
            for old, new in ((state.k, k), (state.v, v))
        )
    blocks = _fit(blocks or DEFAULT, time, k.shape[1])
    scaled = (q.astype(jnp.float32) * options["scale"]).astype(q.dtype)
    operands = (
        _by_head(scaled, blocks.block_q),
        _by_head(k.astype(q.dtype), blocks.block_kv),
        _by_head(v.astype(q.dtype), blocks.block_kv),
    )
    ids = None
    if q_ids is not None and kv_ids is not None:
        ids = splash.SegmentIds(_pad(q_ids, blocks.block_q), _pad(kv_ids, blocks.block_kv))
    kernel = _kernel(operands, k.shape[1] - time, options, blocks)
    sinks = inputs["sink"].astype(jnp.float32) if options["sink"] else None
    mapped = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0, None))
    out = mapped(*operands, ids, sinks)[:, :, :time].transpose(0, 2, 1, 3)
    return segments.blank_padding(out, placed.q_segment), placed.state


def _fit(blocks: Attention, time: int, source: int) -> Attention:
    for name, size in (("block_q", blocks.block_q), ("block_kv", blocks.block_kv)):
        if size % LANES:
            raise ValueError(f"{name}={size} must be a multiple of {LANES} on a TPU")
    return Attention(blocks.block_q, blocks.block_kv, LANES).fit(time, source)


def _kernel(
    operands: tuple[Array, Array, Array], offset: int, options: Options, blocks: Attention
) -> Any:
    """The kernel for one row of the batch; query 0 is at key `offset`."""
    heads, shape = operands[0].shape[1], (operands[0].shape[2], operands[1].shape[2])
    if options["window"]:
        mask = splash.LocalMask(shape, (options["window"] - 1, 0), offset)
    else:
        mask = splash.CausalMask(shape, offset)
    block_q, block_kv = blocks.block_q, blocks.block_kv
    # Narrow heads would be padded to whole rows of lanes in HBM; time along lanes is not padded.
    narrow = operands[0].shape[-1] < LANES
    layout = splash.QKVLayout.SEQ_MINOR if narrow else splash.QKVLayout.HEAD_DIM_MINOR
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        attn_logits_soft_cap=options["logits_soft_cap"] or None,
        interpret=device.interpreter(),
    )


def _take(x: Float[Array, "B S G K"], slot: Int[Array, "B S"]) -> Float[Array, "B S G K"]:
    return jnp.take_along_axis(x, slot[:, :, None, None], axis=1)


def _by_head(x: Float[Array, "B T H K"], block: int) -> Float[Array, "B H T K"]:
    """Pads time to whole blocks; padded queries are dropped, padded keys are never seen."""
    more = round_up(x.shape[1], block) - x.shape[1]
    return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, more), (0, 0)))


def _pad(x: Int[Array, "B T"], block: int) -> Int[Array, "B T"]:
    return jnp.pad(x, ((0, 0), (0, round_up(x.shape[1], block) - x.shape[1])))
