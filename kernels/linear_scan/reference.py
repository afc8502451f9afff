"""Diagonal linear recurrences by their definition, one token at a time, float32.

    gate    h_t = exp(log_decay_t) h_{t-1} + x_t                       y_t = h_t
    log_sum h_t = log(exp(h_{t-1}) + exp(x_t)), -inf at a start        y_t = h_t
    modes   h_t = lambda h_{t-1} + x_t,  lambda_n = exp(log_magnitude_n + i angle_n)
            y_t = sum_n Re(c_n h_{t,n})

Complex numbers are pairs of a real and an imaginary part. A document starts from h = 0, and padding
leaves h unchanged.
"""

from typing import Protocol, Self

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import oracle, segments
from kernels.contract import Options
from kernels.letters import Inputs

HIGHEST = lax.Precision.HIGHEST


class State(Protocol):
    """What the reference reads from a state: both parts of h per channel, and the document."""

    re: Array
    im: Array
    segment: Array

    def _replace(self, **fields: Array) -> Self: ...


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: State, *, options: Options
) -> tuple[Float[Array, "B T H K"], State]:
    """Output and state of T more tokens; without modes `im` stays unchanged."""
    x = inputs["x"]
    belongs = segments.continued(segment_ids, state.segment, x.shape[1])
    before = jnp.concatenate([state.segment[:, None], belongs[:, :-1]], axis=1)
    is_token = jnp.ones_like(belongs, bool) if segment_ids is None else segment_ids != 0
    by_time = lambda part: jnp.moveaxis(part, 1, 0)
    starts, is_token = by_time(belongs != before), by_time(is_token)
    floats = {name: oracle.wide(array) for name, array in inputs.items()}
    tokens = by_time(floats["x"])
    entered = jnp.stack([state.re, state.im]).astype(tokens.dtype)
    if options["transition"] == "gate":
        decay = by_time(jnp.exp(floats["log_decay"]))
        h, out = _gated(entered[0, ..., 0], (tokens, decay, starts, is_token))
        state = state._replace(re=h[..., None])  # pyright: ignore[reportPrivateUsage] (public)
    elif options["transition"] == "log_sum":
        h, out = _summed(entered[0, ..., 0], (tokens, starts, is_token))
        state = state._replace(re=h[..., None])  # pyright: ignore[reportPrivateUsage] (public)
    else:
        h, out = _modal(entered, (tokens, starts, is_token), floats)
        state = state._replace(re=h[0], im=h[1])  # pyright: ignore[reportPrivateUsage]
    out = segments.blank_padding(jnp.moveaxis(out, 0, 1), segment_ids).astype(x.dtype)
    return out, state._replace(segment=belongs[:, -1])  # pyright: ignore[reportPrivateUsage]


def _gated(
    h: Float[Array, "B H K"], tokens: tuple[Array, Array, Array, Array]
) -> tuple[Array, Array]:
    def advance(h: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        x, decay, starts, is_token = token
        h = jnp.where(starts[:, None, None], 0.0, h)
        moved = jnp.einsum("bhk,bhk->bhk", decay, h, precision=HIGHEST) + x
        h = jnp.where(is_token[:, None, None], moved, h)
        return h, h

    return lax.scan(advance, h, tokens)


def _summed(h: Float[Array, "B H K"], tokens: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    def advance(h: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, starts, is_token = token
        # The smaller term is written relative to the larger one, so nothing overflows.
        largest = jnp.maximum(h, x)
        both = largest + jnp.log1p(jnp.exp(jnp.minimum(h, x) - largest))
        moved = jnp.where(starts[:, None, None], x, both)
        h = jnp.where(is_token[:, None, None], moved, h)
        return h, h

    return lax.scan(advance, h, tokens)


def _modal(
    h: Float[Array, "2 B H K N"], tokens: tuple[Array, Array, Array], floats: Inputs
) -> tuple[Array, Array]:
    magnitude = jnp.exp(floats["log_magnitude"])
    re, im = magnitude * jnp.cos(floats["angle"]), magnitude * jnp.sin(floats["angle"])
    turn = jnp.stack([jnp.stack([re, -im]), jnp.stack([im, re])])
    c = jnp.stack([floats["c_re"], -floats["c_im"]])

    def advance(h: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, starts, is_token = token
        h = jnp.where(starts[:, None, None, None], 0.0, h)
        moved = jnp.einsum("pqhkn,qbhkn->pbhkn", turn, h, precision=HIGHEST)
        moved = moved.at[0].add(x[..., None])
        h = jnp.where(is_token[:, None, None, None], moved, h)
        return h, jnp.einsum("phkn,pbhkn->bhk", c, h, precision=HIGHEST)

    return lax.scan(advance, h, tokens)
