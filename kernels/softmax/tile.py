"""One tile of softmax attention: rows of queries against one block of keys, in float32.

s = scale q k - slope (i - j),  s = c tanh(s / c),  masked to a large negative number
ds = A (dO V^T - delta) sech^2(s / c)        A = exp(s - lse), delta = dO . O

The slope of the cap, sech^2(s / c) with s before the cap, is computed as 4 u / (1 + u)^2 with
u = e^(-2 |s / c|): 1 - tanh^2 has no digits left where the cap is reached.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.primitives.online_softmax import MASKED


class Logits(NamedTuple):
    """Masked logits, and the slope of the soft cap (None without one)."""

    logits: Float[Array, "*rows S"]
    slope: Float[Array, "*rows S"] | None


def score(
    products: Float[Array, "*rows S"],
    seen: Bool[Array, "*batch rows S"],
    bias: Float[Array, "*batch rows S"] | None,
    cap: float,
) -> Logits:
    """The logits of one tile, from scale q k."""
    logits, slope = products, None
    if bias is not None:
        logits = logits - bias
    if cap:
        u = jnp.exp(-2.0 * jnp.abs(logits / cap))
        logits, slope = cap * jnp.tanh(logits / cap), 4.0 * u / jnp.square(1.0 + u)
    return Logits(jnp.where(seen, logits, MASKED), slope)


def logit_cotangent(
    tile: Logits,
    weights: Float[Array, "*rows S"],
    d_weights: Float[Array, "*rows S"],
    delta: Float[Array, "*rows"],
) -> Float[Array, "*rows S"]:
    """The cotangent of scale q k."""
    d_logits = weights * (d_weights - delta[..., None])
    return d_logits if tile.slope is None else d_logits * tile.slope
