"""Sums of log decay between the tokens of a chunk, and their derivative.

    span_ij = sum_{j < s <= i} g_s      (i >= j; 0 above the diagonal)

Each is summed anew, not subtracted as b_i - b_j from one running sum b: after a token that forgets
nearly all, b is large and would round the small sums after it away. The sums of all pairs are one
product with a triangle of ones. The plain form is the double loop.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.primitives import square


def spans(g: Float[Array, "*batch 1 C"]) -> Float[Array, "*batch C C"]:
    """The sums of all pairs."""
    length = g.shape[-1]
    return _times(_since(g), square.below(length).astype(g.dtype))


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
) -> Float[Array, "*batch 1 C"]:
    """Cotangent of g from those of `spans`, `start`, `rest` and of the sum of all; `d_span` is zero
    above the diagonal."""
    length = d_span.shape[-1]
    # Token s is in span_ij where j < s <= i, in start_i where s <= i, in rest_j where s > j.
    earlier = square.index(length, 0) < square.index(length, 1)
    through = _times(d_span, earlier.astype(d_span.dtype)) + d_start
    return jnp.sum(jnp.where(earlier, d_rest, through), axis=-2, keepdims=True) + d_total


def _since(g: Float[Array, "*batch 1 C"]) -> Float[Array, "*batch C C"]:
    return jnp.where(square.lower(g.shape[-1]), g, 0.0)


def _times(x: Float[Array, "*batch C C"], triangle: Float[Array, "C C"]) -> Array:
    """x @ triangle as one flat product."""
    flat = x.reshape(-1, x.shape[-1])
    product = lax.dot(flat, triangle, precision=lax.Precision.HIGHEST)
    return product.reshape(x.shape)
