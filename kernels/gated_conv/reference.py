"""Causal convolution of every channel along time by its definition: token by token, float32.

    y_t = gate_t * (bias + sum_{w < W} weight_w x_{t-W+1+w})

The last tap is the token itself. Taps before the start of the document read zeros. Padding is not a
token: taps reach over it to the tokens before it.
"""

from typing import Protocol, Self

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import oracle, segments
from kernels.contract import Options
from kernels.letters import Inputs

HIGHEST = lax.Precision.HIGHEST


class Tail(Protocol):
    """What the reference reads from a state: the document's last W inputs, and the document."""

    tail: Array
    segment: Array

    def _replace(self, **fields: Array) -> Self: ...


def apply(
    inputs: Inputs, segment_ids: Int[Array, "B T"] | None, state: Tail, *, options: Options
) -> tuple[Float[Array, "B T H K"], Tail]:
    """Output and state of T more tokens."""
    x = inputs["x"]
    weight = oracle.wide(inputs["weight"])
    belongs = segments.continued(segment_ids, state.segment, x.shape[1])
    before = jnp.concatenate([state.segment[:, None], belongs[:, :-1]], axis=1)
    is_token = jnp.ones_like(belongs, bool) if segment_ids is None else segment_ids != 0

    def advance(tail: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, starts, is_token = now
        tail = jnp.where(starts[:, None, None, None], 0.0, tail)
        moved = jnp.concatenate([tail[:, :, 1:], x[:, :, None]], axis=2)
        tail = jnp.where(is_token[:, None, None, None], moved, tail)
        return tail, jnp.einsum("bhwk,hkw->bhk", tail, weight, precision=HIGHEST)

    by_time = lambda part: jnp.moveaxis(part, 1, 0)
    along = by_time(oracle.wide(x)), by_time(belongs != before), by_time(is_token)
    tail, out = lax.scan(advance, state.tail.astype(along[0].dtype), along)
    out = jnp.moveaxis(out, 0, 1)
    if options["bias"]:
        out = out + oracle.wide(inputs["bias"])
    if options["gate"]:
        out = out * oracle.wide(inputs["gate"])
    out = segments.blank_padding(out, segment_ids).astype(x.dtype)
    state = state._replace(  # pyright: ignore[reportPrivateUsage] (public for named tuples)
        tail=tail, segment=belongs[:, -1]
    )
    return out, state
