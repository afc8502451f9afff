"""Stick-breaking attention by its definition (Tan et al., arXiv 2410.17980, section 3), float32.

    z_ij = scale q_i . k_j          beta_ij = sigmoid(z_ij)
    A_ij = beta_ij prod_{j < l < i} (1 - beta_il)        the stick is broken from the nearest key on
    rem_i = prod_{l < i} (1 - beta_il) = 1 - sum_j A_ij
    o_i = sum_j A_ij v_j  [+ rem_i v_i | + rem_i bias_h]

With `attend_current`, products and sums include l = i and j = i. A key that token i does not see
takes nothing from the stick. `backward` is the derivative derived by hand, with G = A (dO V^T):

    dz_ij = (1 - beta_ij) G_ij - beta_ij (sum_{l < j} G_il + rem_i drem_i)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import oracle, segments
from kernels.contract import Cache, Options
from kernels.letters import Inputs

HIGHEST = jax.lax.Precision.HIGHEST


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: Cache, *, options: Options
) -> tuple[Float[Array, "B T H V"], Cache]:
    """Output and state of T more tokens; `state` has fields k, v, segment_ids and length."""
    segment_ids = oracle.continued(state, segment_ids, inputs["q"].shape[1])
    slot = state.length[:, None] + jnp.cumsum(segment_ids != 0, axis=1) - 1
    state = oracle.written(state, inputs, segment_ids, slot)
    source = jnp.arange(state.k.shape[1])
    seen = segments.visible(
        slot[:, :, None],
        source,
        segment_ids[:, :, None],
        state.segment_ids[:, None],
        strict=not options["attend_current"],
    )
    weights, remainder = _weights(inputs["q"], state.k, seen[:, None], options)
    values = _per_head(state.v, inputs["q"])
    out = jnp.einsum("bhts,bshv->bthv", weights, values, precision=HIGHEST)
    out = out + _rest(remainder, inputs, options)
    return segments.blank_padding(out, segment_ids).astype(inputs["q"].dtype), state


def backward(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, d_out: Array, *, options: Options
) -> Inputs:
    """Cotangents of all inputs for one whole sequence, by the hand-derived formulas."""
    q = inputs["q"]
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    index = jnp.arange(q.shape[1])
    seen = segments.visible(
        index[:, None],
        index,
        segment_ids[:, :, None],
        segment_ids[:, None],
        strict=not options["attend_current"],
    )[:, None]
    d_out = segments.blank_padding(oracle.wide(d_out), segment_ids)
    weights, remainder = _weights(q, inputs["k"], seen, options)
    keys, values = _per_head(inputs["k"], q), _per_head(inputs["v"], q)
    z = _logits(q, inputs["k"], options)
    beta, kept = (jnp.where(seen, jax.nn.sigmoid(x), 0.0) for x in (z, -z))
    grads: Inputs = {}
    d_rem = jnp.zeros_like(remainder)
    d_v = jnp.einsum("bhts,bthv->bshv", weights, d_out, precision=HIGHEST)
    if options["remainder"] == "value":
        d_rem = jnp.einsum("bthv,bthv->bht", d_out, values, precision=HIGHEST)
        d_v = d_v + jnp.einsum("bht,bthv->bthv", remainder, d_out)
    if options["remainder"] == "bias":
        bias = inputs["remainder_bias"]
        d_rem = jnp.einsum("bthv,hv->bht", d_out, bias, precision=HIGHEST)
        grads["remainder_bias"] = jnp.einsum("bht,bthv->hv", remainder, d_out, precision=HIGHEST)
    flow = weights * jnp.einsum("bthv,bshv->bhts", d_out, values, precision=HIGHEST)
    farther = jnp.cumsum(jnp.pad(flow[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=-1)
    d_z = kept * flow - beta * (farther + (remainder * d_rem)[..., None])
    d_z = d_z * options["scale"]
    grads["q"] = jnp.einsum("bhts,bshk->bthk", d_z, keys, precision=HIGHEST)
    d_k = jnp.einsum("bhts,bthk->bshk", d_z, oracle.wide(q), precision=HIGHEST)
    grads["k"], grads["v"] = _per_group(d_k, inputs["k"]), _per_group(d_v, inputs["v"])
    return {name: grad.astype(inputs[name].dtype) for name, grad in grads.items()}


def _per_head(x: Array, q: Array) -> Array:
    return jnp.repeat(oracle.wide(x), q.shape[2] // x.shape[2], axis=2)


def _per_group(x: Array, like: Array) -> Array:
    return x.reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3)


def _logits(q: Array, k: Array, options: Options) -> Array:
    q = oracle.wide(q) * options["scale"]
    return jnp.einsum("bthk,bshk->bhts", q, _per_head(k, q), precision=HIGHEST)


def _weights(
    q: Array, k: Array, seen: Bool[Array, "B 1 T S"], options: Options
) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T"]]:
    logits = _logits(q, k, options)
    log_kept = jnp.where(seen, jax.nn.log_sigmoid(-logits), 0.0)
    through = jnp.cumsum(log_kept[..., ::-1], axis=-1)[..., ::-1]
    nearer = jnp.concatenate([through[..., 1:], jnp.zeros_like(through[..., :1])], axis=-1)
    exponent = jnp.where(seen, jax.nn.log_sigmoid(logits) + nearer, 0.0)
    return jnp.where(seen, jnp.exp(exponent), 0.0), jnp.exp(through[..., 0])


def _rest(remainder: Array, inputs: Inputs, options: Options) -> Array | float:
    """What the remainder of the stick adds to the output."""
    if options["remainder"] == "value":
        return jnp.einsum("bht,bthv->bthv", remainder, _per_head(inputs["v"], inputs["q"]))
    if options["remainder"] == "bias":
        return jnp.einsum("bht,hv->bthv", remainder, oracle.wide(inputs["remainder_bias"]))
    return 0.0
