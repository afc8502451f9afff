"""One tile of stick-breaking attention: rows of queries against one block of keys.

With `left` the sum of softplus over nearer keys in blocks already visited, strict within the tile:

    log A_j = z_j - softplus(z_j) - sum_{l > j} softplus(z_l) - left            all of it <= 0
    dz_j = G_j - sigmoid(z_j) (sum_{l <= j} G_l + flow)          G = A (dO V^T)

where `flow` holds the G of farther keys and the cotangent of log rem. All is float32. Either axis
may be the keys': the sums along keys come with the tile, and `left` and `flow` have its rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# What follows each key (`weigh`) or leads up to it (`logit_cotangent`), and the sum of all keys.
type SumOverKeys = Callable[[Array], tuple[Array, Array]]

# A finite stand-in for -inf: softplus, its exponential and the weight are then exactly 0.
MASKED = -1e30


class Weights(NamedTuple):
    """Weights of a tile, log sigmoid(z), and the sum of softplus over the tile's keys."""

    weights: Float[Array, "*tile"]
    log_beta: Float[Array, "*tile"]
    total: Float[Array, "*rows"]


def mask(products: Float[Array, "*tile"], seen: Bool[Array, "*tile"]) -> Float[Array, "*tile"]:
    """Logits of one tile from scale q k."""
    return jnp.where(seen, products, MASKED)


def weigh(
    z: Float[Array, "*tile"],
    broken: Float[Array, "*tile"],
    left: Float[Array, "#*tile"],
    suffix: SumOverKeys,
) -> Weights:
    """The weights of one tile of masked logits; `broken` is their softplus."""
    nearer, total = suffix(broken)
    log_beta = z - broken
    return Weights(jnp.exp(log_beta - (nearer + left)), log_beta, total)


def logit_cotangent(
    weights: Float[Array, "*tile"],
    beta: Float[Array, "*tile"],
    d_weights: Float[Array, "*tile"],
    flow: Float[Array, "#*tile"],
    prefix: SumOverKeys,
) -> tuple[Float[Array, "*tile"], Float[Array, "*rows"]]:
    """Cotangent of the tile's logits, and what the tile adds to the `flow` of the next nearer;
    `beta` is their sigmoid.
    """
    moved = weights * d_weights
    farther, total = prefix(moved)
    return moved - beta * (farther + flow), total
