"""Softmax over keys that arrive in parts (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3).

    m' = max(m, max_j s_j)      l' = l e^(m - m') + sum_j e^(s_j - m')
    o' = o e^(m - m') + sum_j e^(s_j - m') v_j

At the end the output is o / l and lse = m + log l. The plain form is `jax.nn.softmax`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# A finite stand-in for -inf: differences of masked logits stay numbers.
MASKED = -1e30


class Running(NamedTuple):
    """The maximum, the sum and the weighted values over the keys so far."""

    maximum: Float[Array, "*rows"]
    total: Float[Array, "*rows"]
    out: Float[Array, "*rows V"]


def update(
    running: Running, logits: Float[Array, "*rows S"], v: Float[Array, "*batch S V"]
) -> Running:
    """The running softmax after one more part of the keys."""
    maximum = jnp.maximum(running.maximum, jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - maximum[..., None])
    keep = jnp.exp(running.maximum - maximum)
    total = running.total * keep + jnp.sum(weights, axis=-1)
    return Running(maximum, total, running.out * keep[..., None] + weights @ v)


def finish(running: Running) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows"]]:
    """The softmax-weighted values, and the log of the sum of exponentials."""
    # A row may have seen no key: 0 / 0 would be NaN, and NaN survives a zero cotangent.
    total = jnp.where(running.total > 0.0, running.total, 1.0)
    return running.out / total[..., None], running.maximum + jnp.log(total)
