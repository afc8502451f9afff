"""The delta rule by its definition (Yang et al., arXiv 2406.06484 and 2412.06464), float32.

    S'_t = exp(g_t) S_{t-1}                  decay first; without decay S' = S
    u_t  = beta_t (v_t - S'_t^T k_t)         what is written: the error of the memory at k_t
    S_t  = S'_t + k_t u_t^T                  o_t = scale S_t^T q_t

Tokens are computed one after another. A document starts from S = 0, and padding leaves S unchanged.
`backward` is the derivative derived by hand. With dS the cotangent of S_t, from t = T down to 1:

    dS  += scale q_t do_t^T                  dq_t = scale S_t do_t
    du   = dS^T k_t                          dr   = beta_t du          dv_t = dr
    dbeta_t = du . (v_t - S'_t^T k_t)        dk_t = dS u_t - S'_t dr
    dS'  = dS - k_t dr^T                     dg_t = <dS', S'_t>        dS_{t-1} = exp(g_t) dS'
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
    """Inputs in float32 with time first and q scaled, and which tokens start a document."""

    q: Float[Array, "T B H K"]
    k: Float[Array, "T B H K"]
    v: Float[Array, "T B H V"]
    beta: Float[Array, "T B H"]
    decay: Float[Array, "T B H"]
    starts: Bool[Array, "T B"]


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: Memory, *, options: Options
) -> tuple[Float[Array, "B T H V"], Memory]:
    """Output and state of T more tokens."""
    tokens, segment = _tokens(inputs, segment_ids, state.segment, options)
    s, (out, _) = lax.scan(_advance, state.s.astype(tokens.q.dtype), tokens)
    out = segments.blank_padding(jnp.moveaxis(out, 0, 1), segment_ids)
    state = state._replace(s=s, segment=segment)  # pyright: ignore[reportPrivateUsage] (public)
    return out.astype(inputs["q"].dtype), state


def backward(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, d_out: Array, *, options: Options
) -> Inputs:
    """Cotangents of all inputs for one whole sequence, by the hand-derived formulas."""
    batch, _, heads, width = inputs["k"].shape
    empty = jnp.zeros((batch, heads, width, inputs["v"].shape[3]), jnp.float32)
    tokens, _ = _tokens(inputs, segment_ids, jnp.zeros((batch,), jnp.int32), options)
    _, (_, entered) = lax.scan(_advance, empty, tokens)
    d_out = jnp.moveaxis(segments.blank_padding(oracle.wide(d_out), segment_ids), 1, 0)
    _, grads = lax.scan(_retreat, empty, (tokens, entered, d_out), reverse=True)
    grads = {name: jnp.moveaxis(grad, 0, 1) for name, grad in grads.items()}
    grads["q"] = grads["q"] * options["scale"]
    if segment_ids is not None:
        for name in ("beta", "log_decay"):
            grads[name] = jnp.where((segment_ids != 0)[..., None], grads[name], 0.0)
    return {name: grads[name].astype(x.dtype) for name, x in inputs.items()}


def _tokens(
    inputs: Inputs, segment_ids: Array | None, entry: Array, options: Options
) -> tuple[Tokens, Int[Array, " B"]]:
    """The inputs of the recurrence, and the document of the last token."""
    x = {name: jnp.moveaxis(oracle.wide(array), 1, 0) for name, array in inputs.items()}
    log_decay = x.get("log_decay", jnp.zeros_like(x["beta"]))
    beta = x["beta"]
    if segment_ids is not None:
        keep = (segment_ids != 0).T[..., None]
        beta, log_decay = jnp.where(keep, beta, 0.0), jnp.where(keep, log_decay, 0.0)
    belongs = segments.continued(segment_ids, entry, x["q"].shape[0])
    before = jnp.concatenate([entry[:, None], belongs[:, :-1]], axis=1)
    starts = (belongs != before).T if segment_ids is not None else jnp.zeros(beta.shape[:2], bool)
    q = x["q"] * options["scale"]
    return Tokens(q, x["k"], x["v"], beta, jnp.exp(log_decay), starts), belongs[:, -1]


def _advance(s: Array, now: Tokens) -> tuple[Array, tuple[Array, Array]]:
    """S_t from S_{t-1}; also returns the output, and S_{t-1} for the backward."""
    s = jnp.where(now.starts[:, None, None, None], 0.0, s)
    faded = now.decay[..., None, None] * s
    recalled = jnp.einsum("bhkv,bhk->bhv", faded, now.k, precision=HIGHEST)
    wrote = now.beta[..., None] * (now.v - recalled)
    new = faded + jnp.einsum("bhk,bhv->bhkv", now.k, wrote, precision=HIGHEST)
    return new, (jnp.einsum("bhkv,bhk->bhv", new, now.q, precision=HIGHEST), s)


def _retreat(d_s: Array, now: tuple[Tokens, Array, Array]) -> tuple[Array, Inputs]:
    """dS_{t-1} from dS_t, and the cotangents of token t."""
    token, s, d_out = now
    beta, decay = token.beta[..., None], token.decay[..., None, None]
    faded = decay * s
    error = token.v - jnp.einsum("bhkv,bhk->bhv", faded, token.k, precision=HIGHEST)
    new = faded + jnp.einsum("bhk,bhv->bhkv", token.k, beta * error, precision=HIGHEST)
    d_s = d_s + jnp.einsum("bhk,bhv->bhkv", token.q, d_out, precision=HIGHEST)
    d_wrote = jnp.einsum("bhkv,bhk->bhv", d_s, token.k, precision=HIGHEST)
    d_error = beta * d_wrote
    d_k = jnp.einsum("bhkv,bhv->bhk", d_s, beta * error, precision=HIGHEST)
    d_k = d_k - jnp.einsum("bhkv,bhv->bhk", faded, d_error, precision=HIGHEST)
    d_faded = d_s - jnp.einsum("bhk,bhv->bhkv", token.k, d_error, precision=HIGHEST)
    grads = {
        "q": jnp.einsum("bhkv,bhv->bhk", new, d_out, precision=HIGHEST),
        "k": d_k,
        "v": d_error,
        "beta": jnp.einsum("bhv,bhv->bh", d_wrote, error, precision=HIGHEST),
        "log_decay": jnp.einsum("bhkv,bhkv->bh", d_faded, faded, precision=HIGHEST),
    }
    return jnp.where(token.starts[:, None, None, None], 0.0, decay * d_faded), grads
