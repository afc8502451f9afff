"""Linear attention with decay by its definition, float32 (Katharopoulos et al., arXiv 2006.16236,
section 3.4; decay per channel: Yang et al., arXiv 2312.06635, section 4).

    S_t = decay_t S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

decay_t is 1, or exp(g_t) per head, or exp(g_t) per row of S. Tokens are computed one after another.
A document starts from S = 0, and padding leaves S unchanged. `backward` is the derivative derived
by hand. With dS the cotangent of S_t, from t = T down to 1:

    dS  += scale q_t do_t^T        dq_t = scale S_t do_t
    dk_t = dS v_t                  dv_t = dS^T k_t
    dg_t = decay_t <dS, S_{t-1}>   dS_{t-1} = decay_t dS

where <,> sums over V, and also over K where the decay is per head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels import oracle, segments
from kernels.contract import Memory, Options
from kernels.letters import Inputs

HIGHEST = jax.lax.Precision.HIGHEST


class Tokens(NamedTuple):
    """Inputs in float32 with time first and q scaled; which tokens start a document or are real."""

    q: Float[Array, "T B H K"]
    k: Float[Array, "T B H K"]
    v: Float[Array, "T B H V"]
    decay: Float[Array, "T B h k 1"]
    starts: Bool[Array, "T B 1 1 1"]
    real: Bool[Array, "T B 1 1 1"]


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: Memory, *, options: Options
) -> tuple[Float[Array, "B T H V"], Memory]:
    """Output and state of T more tokens."""
    belongs = segments.continued(segment_ids, state.segment, inputs["q"].shape[1])
    tokens = _tokens(inputs, segment_ids, belongs, state.segment, options)

    def advance(s: Array, x: Tokens) -> tuple[Array, Array]:
        s = _advance(s, x)
        return s, jnp.einsum("bhkv,bhk->bhv", s, x.q, precision=HIGHEST)

    s, out = lax.scan(advance, state.s.astype(tokens.q.dtype), tokens)
    out = segments.blank_padding(jnp.moveaxis(out, 0, 1), segment_ids)
    state = state._replace(s=s, segment=belongs[:, -1])  # pyright: ignore[reportPrivateUsage] (public)
    return out.astype(inputs["q"].dtype), state


def backward(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, d_out: Array, *, options: Options
) -> Inputs:
    """Cotangents of all inputs for one whole sequence, by the hand-derived formulas."""
    batch, time, heads, width = inputs["q"].shape
    entry = jnp.zeros((batch,), jnp.int32)
    belongs = segments.continued(segment_ids, entry, time)
    tokens = _tokens(inputs, segment_ids, belongs, entry, options)
    d_out = segments.blank_padding(oracle.wide(d_out), segment_ids)
    empty = jnp.zeros((batch, heads, width, d_out.shape[-1]), jnp.float32)
    _, before = lax.scan(lambda s, x: (_advance(s, x), s), empty, tokens)

    def retreat(d_s: Array, now: tuple[Tokens, Array, Array]) -> tuple[Array, Inputs]:
        x, s, d_out = now
        grads = {"q": jnp.einsum("bhkv,bhv->bhk", _advance(s, x), d_out, precision=HIGHEST)}
        d_s = d_s + jnp.einsum("bhk,bhv->bhkv", x.q, d_out, precision=HIGHEST)
        written = jnp.where(x.real, d_s, 0.0)
        grads["k"] = jnp.einsum("bhkv,bhv->bhk", written, x.v, precision=HIGHEST)
        grads["v"] = jnp.einsum("bhkv,bhk->bhv", written, x.k, precision=HIGHEST)
        kept = jnp.where(x.starts, 0.0, x.decay * written)
        grads["log_decay"] = jnp.sum(kept * s, axis=-1)
        return jnp.where(x.real, kept, d_s), grads

    moved = jnp.moveaxis(d_out, 1, 0)
    _, grads = lax.scan(retreat, empty, (tokens, before, moved), reverse=True)
    grads["q"] = options["scale"] * grads["q"]
    if options["decay"] == "scalar":
        grads["log_decay"] = jnp.sum(grads["log_decay"], axis=-1)
    return {name: jnp.moveaxis(grads[name], 0, 1).astype(x.dtype) for name, x in inputs.items()}


def _tokens(
    inputs: Inputs, segment_ids: Array | None, belongs: Array, entry: Array, options: Options
) -> Tokens:
    x = {name: jnp.moveaxis(oracle.wide(x), 1, 0) for name, x in inputs.items()}
    decay = jnp.ones((belongs.shape[1], 1, 1, 1, 1), x["q"].dtype)
    if options["decay"] != "none":
        decay = jnp.exp(x["log_decay"])
        decay = decay.reshape(*decay.shape[:3], -1, 1)
    starts = belongs != jnp.concatenate([entry[:, None], belongs[:, :-1]], axis=1)
    real = jnp.ones_like(starts) if segment_ids is None else segment_ids != 0
    starts, real = (mask.T[..., None, None, None] for mask in (starts, real))
    return Tokens(options["scale"] * x["q"], x["k"], x["v"], decay, starts, real)


def _advance(s: Float[Array, "B H K V"], x: Tokens) -> Float[Array, "B H K V"]:
    """The state after one token."""
    outer = jnp.einsum("bhk,bhv->bhkv", x.k, x.v, precision=HIGHEST)
    fresh = x.decay * jnp.where(x.starts, 0.0, s) + outer
    return jnp.where(x.real, fresh, s)
