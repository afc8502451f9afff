"""Softmax attention as it is defined (Vaswani et al., arXiv 1706.03762, eq. 1), float32.

    s_ij = scale q_i . k_j - slope_h (i - j)        slopes: ALiBi, Press et al., arXiv 2108.12409
    s_ij = c tanh(s_ij / c)                         c = logits_soft_cap, where it is not 0
    A_ij = exp(s_ij) / sum_l exp(s_il)              over the keys that i sees: 0 <= i - j < window
    o_i = sum_j A_ij v_j

`backward` is the derivative worked out by hand, with dA = dO V^T:

    ds_ij = A_ij (dA_ij - sum_l A_il dA_il) (1 - (s_ij / c)^2)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import segments
from kernels.contract import Cache, Options
from kernels.letters import Inputs

HIGHEST = jax.lax.Precision.HIGHEST


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: Cache, *, options: Options
) -> tuple[Float[Array, "B T H V"], Cache]:
    """Output and state of T more tokens; `state` has fields k, v, segment_ids and length."""
    segment_ids = _continue(state, segment_ids, inputs["q"].shape[1])
    slot = state.length[:, None] + jnp.cumsum(segment_ids != 0, axis=1) - 1
    state = _write(state, inputs, segment_ids, slot)
    source = jnp.arange(state.k.shape[1])
    logits = _logits(inputs, state.k, slot, source, options)
    seen = _seen(slot, source, segment_ids, state.segment_ids, options)
    weights = _softmax(logits, seen)
    values = _per_head(state.v, inputs["q"])
    out = jnp.einsum("bhts,bshv->bthv", weights, values, precision=HIGHEST)
    return segments.blank_padding(out, segment_ids).astype(inputs["q"].dtype), state


def backward(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, d_out: Array, *, options: Options
) -> Inputs:
    """Cotangents of q, k and v for one whole sequence, by hand."""
    q = inputs["q"]
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    index = jnp.arange(q.shape[1])
    slot = jnp.broadcast_to(index, segment_ids.shape)
    logits = _logits(inputs, inputs["k"], slot, index, options)
    weights = _softmax(logits, _seen(slot, index, segment_ids, segment_ids, options))
    d_out = segments.blank_padding(d_out.astype(jnp.float32), segment_ids)
    keys, values = _per_head(inputs["k"], q), _per_head(inputs["v"], q)
    d_weights = jnp.einsum("bthv,bshv->bhts", d_out, values, precision=HIGHEST)
    d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=-1, keepdims=True))
    if cap := options["logits_soft_cap"]:
        d_logits = d_logits * (1.0 - jnp.square(logits / cap))
    d_logits = d_logits * options["scale"]
    d_q = jnp.einsum("bhts,bshk->bthk", d_logits, keys, precision=HIGHEST)
    d_k = jnp.einsum("bhts,bthk->bshk", d_logits, q.astype(jnp.float32), precision=HIGHEST)
    d_v = jnp.einsum("bhts,bthv->bshv", weights, d_out, precision=HIGHEST)
    grads = {
        "q": d_q,
        "k": _per_group(d_k, inputs["k"]),
        "v": _per_group(d_v, inputs["v"]),
    }
    return {name: grad.astype(inputs[name].dtype) for name, grad in grads.items()}


def _per_head(x: Array, q: Array) -> Array:
    return jnp.repeat(x.astype(jnp.float32), q.shape[2] // x.shape[2], axis=2)


def _per_group(x: Array, like: Array) -> Array:
    return x.reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3)


def _logits(
    inputs: Inputs, k: Array, slot: Int[Array, "B T"], source: Int[Array, " S"], options: Options
) -> Float[Array, "B H T S"]:
    q = inputs["q"].astype(jnp.float32) * options["scale"]
    logits = jnp.einsum("bthk,bshk->bhts", q, _per_head(k, q), precision=HIGHEST)
    if options["alibi"]:
        distance = (slot[:, :, None] - source).astype(jnp.float32)
        logits = logits - inputs["alibi_slopes"][:, None, None] * distance[:, None]
    if cap := options["logits_soft_cap"]:
        logits = cap * jnp.tanh(logits / cap)
    return logits


def _seen(
    slot: Array, source: Array, segment_ids: Array, kv_segment: Array, options: Options
) -> Bool[Array, "B 1 T S"]:
    window = options["window"]
    pairs = slot[:, :, None], source, segment_ids[:, :, None], kv_segment[:, None]
    return segments.visible(*pairs, window=window)[:, None]


def _softmax(logits: Array, seen: Bool[Array, "B 1 T S"]) -> Float[Array, "B H T S"]:
    """Weights over the keys that are seen; all zero where none is."""
    largest = jnp.max(jnp.where(seen, logits, -jnp.inf), axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    raised = jnp.where(seen, jnp.exp(jnp.where(seen, logits - largest, 0.0)), 0.0)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    return raised / jnp.where(total > 0.0, total, 1.0)


def _continue(state: Cache, segment_ids: Array | None, time: int) -> Array:
    """The documents of the new tokens; without any they continue the row's last one."""
    if segment_ids is not None:
        return segment_ids
    row = jnp.arange(state.length.shape[0])
    current = jnp.maximum(state.segment_ids[row, jnp.maximum(state.length - 1, 0)], 1)
    return jnp.broadcast_to(current[:, None], (row.shape[0], time))


def _write(state: Cache, inputs: Inputs, segment_ids: Array, slot: Array) -> Cache:
    """The cache with every token at its slot, as a product with a permutation."""
    source = jnp.arange(state.k.shape[1])
    place = (slot[:, :, None] == source) & (segment_ids != 0)[:, :, None]
    taken = jnp.any(place, axis=1)
    once = place.astype(jnp.float32)

    def put(new: Array, old: Array) -> Array:
        moved = jnp.einsum("bts,btgk->bsgk", once, new.astype(jnp.float32), precision=HIGHEST)
        return jnp.where(taken[..., None, None], moved.astype(old.dtype), old)

    moved = jnp.sum(jnp.where(place, segment_ids[:, :, None], 0), axis=1)
    return state._replace(  # pyright: ignore[reportPrivateUsage] (public for named tuples)
        k=put(inputs["k"], state.k),
        v=put(inputs["v"], state.v),
        segment_ids=jnp.where(taken, moved, state.segment_ids),
        length=state.length + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32),
    )
