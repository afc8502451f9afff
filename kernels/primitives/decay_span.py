"""Sums of log decay between the tokens of a chunk, and their derivative.

    span_ij = sum_{j < s <= i} g_s      (i >= j; 0 above the diagonal)

Each is summed anew, not subtracted as b_i - b_j from one running sum b: after a token that forgets
nearly all, b is large and would round the small sums after it away. The sums of all pairs are one
product with a triangle of ones. The plain form is the double loop.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def spans(g: Float[Array, "*batch C"]) -> Float[Array, "*batch C C"]:
    """The sums of all pairs."""
    length = g.shape[-1]
    terms = jnp.where(np.tri(length, dtype=bool), g[..., None, :], 0.0)
    return _times(terms, np.tri(length, k=-1))


def cotangent(
    d_span: Float[Array, "*batch C C"],
    d_start: Float[Array, "*batch C"],
    d_rest: Float[Array, "*batch C"],
    d_total: Float[Array, "*batch"],
) -> Float[Array, "*batch C"]:
    """Cotangent of g from those of span_ij, of sum_{s <= i} g_s, of sum_{s > j} g_s and of the sum
    of all; `d_span` is zero above the diagonal."""
    length = d_start.shape[-1]
    through = _times(d_span, np.tri(length, k=-1).T)
    between = jnp.sum(jnp.where(np.tri(length, dtype=bool), through, 0.0), axis=-2)
    later = _times(d_start, np.tri(length))
    earlier = _times(d_rest, np.tri(length, k=-1).T)
    return between + later + earlier + d_total[..., None]


def _times(x: Float[Array, "*batch C"], triangle: np.ndarray) -> Float[Array, "*batch C"]:
    """x @ triangle as one flat product."""
    flat = x.reshape(-1, x.shape[-1])
    product = lax.dot(flat, jnp.asarray(triangle, x.dtype), precision=lax.Precision.HIGHEST)
    return product.reshape(x.shape)
