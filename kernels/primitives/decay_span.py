"""Sums of log decay between the tokens of a chunk, and their derivative.

    span_ij = sum_{j < s <= i} g_s      (i >= j; 0 above the diagonal)

Each sum is computed directly, not as the difference b_i - b_j of a running sum b: after a token
that forgets nearly everything, b is large, and the small sums after it would be rounded away. The
sums of all pairs are one product with a triangle of ones. The plain form is the double loop.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.primitives import square
from kernels.primitives.products import Products


def spans(g: Float[Array, "*batch 1 C"], products: Products) -> Float[Array, "*batch C C"]:
    """The sums of all pairs (i, j)."""
    return products.ones(_since(g), square.below(g.shape[-1]))


def start(g: Float[Array, "*batch 1 C"]) -> Float[Array, "*batch C 1"]:
    """sum_{s <= i} g_s"""
    return jnp.sum(_since(g), axis=-1, keepdims=True)


def rest(g: Float[Array, "*batch 1 C"]) -> Float[Array, "*batch C 1"]:
    """sum_{s > j} g_s"""
    later = jnp.where(square.lower(g.shape[-1]), 0.0, g)
    return jnp.sum(later, axis=-1, keepdims=True)


def cotangent(
    d_span: Float[Array, "*batch C C"],
    d_start: Float[Array, "*batch C 1"],
    d_rest: Float[Array, "*batch C 1"],
    d_total: Float[Array, "*batch 1 1"],
    products: Products,
) -> Float[Array, "*batch 1 C"]:
    """The cotangent of g, from those of `spans`, `start`, `rest` and the sum of all g. `d_span` is
    zero above the diagonal."""
    length = d_span.shape[-1]
    # g_s is part of span_ij where j < s <= i, of start_i where s <= i, of rest_j where s > j.
    earlier = square.index(length, 0) < square.index(length, 1)
    through = products.ones(d_span, earlier) + d_start
    return jnp.sum(jnp.where(earlier, d_rest, through), axis=-2, keepdims=True) + d_total


def _since(g: Float[Array, "*batch 1 C"]) -> Float[Array, "*batch C C"]:
    return jnp.where(square.lower(g.shape[-1]), g, 0.0)
