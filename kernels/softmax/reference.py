"""Softmax attention by its definition (Vaswani et al., arXiv 1706.03762, eq. 1), float32.

    s_ij = scale q_i . k_j - slope_h (i - j)        slopes: ALiBi, Press et al., arXiv 2108.12409
    s_ij = c tanh(s_ij / c)                         c = logits_soft_cap, if it is not 0
    A_ij = exp(s_ij) / (sum_l exp(s_il) [+ exp(sink_h)])     over the keys l that i sees
    o_i = sum_j A_ij v_j

Token i sees j <= i of its document if i - j < window or j < global_tokens (j counted from the
document's start), and only if floor(i / block) = floor(j / block). With a distance ceiling c the op
itself rotates q and k (RoPE, Su et al., arXiv 2104.09864; the ceiling: Han et al., arXiv
2308.16137):

    q_i . k_j  becomes  R(i) q_i . R(j) k_j  if i - j < window,  else  R(c) q_i . k_j

`backward` is the derivative derived by hand, with dA = dO V^T. R is orthogonal, so a cotangent is
rotated back by the same angle:

    ds_ij = A_ij (dA_ij - sum_l A_il dA_il) / cosh^2(s_ij / c)        s before the cap
    dsink = -sum_i A_i,sink sum_l A_il dA_il
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import oracle, segments
from kernels.contract import Cache, Options
from kernels.letters import Inputs

HIGHEST = jax.lax.Precision.HIGHEST


class Place(NamedTuple):
    """Slot and position in the document of every query and of every key."""

    slot: Int[Array, "B T"]
    position: Int[Array, "B T"]
    source: Int[Array, " S"]
    kv_position: Int[Array, "B S"]


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: Cache, *, options: Options
) -> tuple[Float[Array, "B T H V"], Cache]:
    """Output and state of T more tokens; `state` has fields k, v, segment_ids and length."""
    segment_ids = oracle.continued(state, segment_ids, inputs["q"].shape[1])
    slot = state.length[:, None] + jnp.cumsum(segment_ids != 0, axis=1) - 1
    state = oracle.written(state, inputs, segment_ids, slot)
    source = jnp.arange(state.k.shape[1])
    position = segments.positions(state.segment_ids)
    own = jnp.take_along_axis(position, jnp.clip(slot, 0, source.shape[0] - 1), axis=1)
    place = Place(slot, own, source, position)
    logits = _logits(inputs, state.k, place, options)
    weights, _ = _softmax(logits, _seen(place, segment_ids, state.segment_ids, options), inputs)
    values = _per_head(state.v, inputs["q"])
    out = jnp.einsum("bhts,bshv->bthv", weights, values, precision=HIGHEST)
    return segments.blank_padding(out, segment_ids).astype(inputs["q"].dtype), state


def backward(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, d_out: Array, *, options: Options
) -> Inputs:
    """Cotangents of q, k, v and the sink for one whole sequence, by the hand-derived formulas."""
    q = inputs["q"]
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    index, position = jnp.arange(q.shape[1]), segments.positions(segment_ids)
    place = Place(jnp.broadcast_to(index, segment_ids.shape), position, index, position)
    logits = _logits(inputs, inputs["k"], place, options)
    weights, sunk = _softmax(logits, _seen(place, segment_ids, segment_ids, options), inputs)
    d_out = segments.blank_padding(oracle.wide(d_out), segment_ids)
    values = _per_head(inputs["v"], q)
    d_weights = jnp.einsum("bthv,bshv->bhts", d_out, values, precision=HIGHEST)
    delta = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = weights * (d_weights - delta)
    if cap := options["logits_soft_cap"]:
        bare = _logits(inputs, inputs["k"], place, {**options, "logits_soft_cap": 0.0})
        d_logits = d_logits / jnp.square(jnp.cosh(bare / cap))
    d_q, d_k = _products_backward(inputs, d_logits * options["scale"], place, options)
    d_v = jnp.einsum("bhts,bthv->bshv", weights, d_out, precision=HIGHEST)
    grads = {
        "q": d_q,
        "k": _per_group(d_k, inputs["k"]),
        "v": _per_group(d_v, inputs["v"]),
    }
    if options["sink"]:
        grads["sink"] = -jnp.sum(sunk * delta, axis=(0, 2, 3))
    return {name: grad.astype(inputs[name].dtype) for name, grad in grads.items()}


def _per_head(x: Array, q: Array) -> Array:
    return jnp.repeat(oracle.wide(x), q.shape[2] // x.shape[2], axis=2)


def _per_group(x: Array, like: Array) -> Array:
    return x.reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3)


def _rotate(x: Array, angle: Float[Array, "#B #T"], theta: float) -> Array:
    """x [B, T, H, K] with channels c, c + K/2 as complex numbers turned by angle theta^(-2c/K)."""
    half = x.shape[-1] // 2
    phase = angle[..., None, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * phase)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _kinds(place: Place, options: Options) -> tuple[tuple[Any, Any, Array | bool], ...]:
    """Angles of queries and of keys (None: no rotation), and the pairs that they apply to."""
    if not options["distance_ceiling"]:
        return ((None, None, True),)
    near = (place.slot[:, :, None] - place.source < options["window"])[:, None]
    ceiling = jnp.full((1, 1), options["distance_ceiling"], jnp.float32)
    turned = place.position.astype(jnp.float32), place.kv_position.astype(jnp.float32)
    return (*turned, near), (ceiling, None, ~near)


def _turn(x: Array, angle: Array | None, options: Options) -> Array:
    return x if angle is None else _rotate(x, angle, options["rope_theta"])


def _logits(inputs: Inputs, k: Array, place: Place, options: Options) -> Float[Array, "B H T S"]:
    q = oracle.wide(inputs["q"]) * options["scale"]
    logits = jnp.zeros((), q.dtype)
    for q_angle, k_angle, pairs in _kinds(place, options):
        turned = _turn(q, q_angle, options), _turn(_per_head(k, q), k_angle, options)
        found = jnp.einsum("bthk,bshk->bhts", *turned, precision=HIGHEST)
        logits = jnp.where(pairs, found, logits)
    if options["alibi"]:
        distance = (place.slot[:, :, None] - place.source).astype(jnp.float32)
        logits = logits - inputs["alibi_slopes"][:, None, None] * distance[:, None]
    if cap := options["logits_soft_cap"]:
        logits = cap * jnp.tanh(logits / cap)
    return logits


def _products_backward(
    inputs: Inputs, d_products: Float[Array, "B H T S"], place: Place, options: Options
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S H K"]]:
    """The cotangents of q and of k, separately for each query head, from those of q k."""
    q = oracle.wide(inputs["q"])
    k = _per_head(inputs["k"], q)
    d_q, d_k = jnp.zeros_like(q), jnp.zeros_like(k)
    for q_angle, k_angle, pairs in _kinds(place, options):
        here = jnp.where(pairs, d_products, 0.0)
        left, right = _turn(q, q_angle, options), _turn(k, k_angle, options)
        left_d = jnp.einsum("bhts,bshk->bthk", here, right, precision=HIGHEST)
        right_d = jnp.einsum("bhts,bthk->bshk", here, left, precision=HIGHEST)
        d_q = d_q + _turn(left_d, None if q_angle is None else -q_angle, options)
        d_k = d_k + _turn(right_d, None if k_angle is None else -k_angle, options)
    return d_q, d_k


def _seen(
    place: Place, segment_ids: Array, kv_segment: Array, options: Options
) -> Bool[Array, "B 1 T S"]:
    pairs = place.slot[:, :, None], place.source, segment_ids[:, :, None], kv_segment[:, None]
    seen = segments.visible(*pairs)
    if options["window"]:
        near = place.slot[:, :, None] - place.source < options["window"]
        seen &= near | (place.kv_position < options["global_tokens"])[:, None]
    if size := options["block"]:
        seen &= place.position[:, :, None] // size == place.kv_position[:, None] // size
    return seen[:, None]


def _softmax(
    logits: Array, seen: Bool[Array, "B 1 T S"], inputs: Inputs
) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T 1"]]:
    """The weights of visible keys, and of the sink; all zero where there is neither."""
    sink = jnp.asarray(-jnp.inf, logits.dtype)
    if "sink" in inputs:
        sink = oracle.wide(inputs["sink"])[:, None, None]
    largest = jnp.max(jnp.where(seen, logits, -jnp.inf), axis=-1, keepdims=True)
    largest = jnp.maximum(largest, sink)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    raised = jnp.where(seen, jnp.exp(jnp.where(seen, logits - largest, 0.0)), 0.0)
    sunk = jnp.exp(sink - largest)
    total = jnp.sum(raised, axis=-1, keepdims=True) + sunk
    total = jnp.where(total > 0.0, total, 1.0)
    return raised / total, sunk / total
