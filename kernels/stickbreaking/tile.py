"""One tile of stick-breaking attention: rows of queries against one block of keys.

With `left` the sum of softplus over nearer keys in blocks already visited, strict within the tile:

    log A_j = z_j - softplus(z_j) - sum_{l > j} softplus(z_l) - left            all of it <= 0
    dz_j = G_j - sigmoid(z_j) (sum_{l <= j} G_l + flow)          G = A (dO V^T)

where `flow` holds the G of farther keys and the cotangent of log rem. All is float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.primitives import log_space

# A finite stand-in for -inf: softplus, its exponential and the weight are then exactly 0.
MASKED = -1e30


class Weights(NamedTuple):
    """Weights of a tile, e^z (bounded), and the sum of softplus over the tile's keys."""

    weights: Float[Array, "*rows S"]
    exp: Float[Array, "*rows S"]
    total: Float[Array, "*rows"]


def weigh(
    q: Float[Array, "*batch rows K"],
    k_t: Float[Array, "*batch K S"],
    seen: Bool[Array, "*batch rows S"],
    left: Float[Array, "*batch rows"],
    run: int,
) -> Weights:
    """The weights of one tile; q is scaled already."""
    z = jnp.where(seen, q @ k_t, MASKED)
    broken, u = log_space.softplus_and_exp(z)
    nearer, total = log_space.suffix_sum(broken, run)
    return Weights(jnp.exp((z - broken) - (nearer + left[..., None])), u, total)


def logit_cotangent(
    tile: Weights,
    d_weights: Float[Array, "*rows S"],
    flow: Float[Array, "*rows"],
    run: int,
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"]]:
    """Cotangent of the tile's logits, and `flow` for the next nearer tile."""
    moved = tile.weights * d_weights
    farther, total = log_space.prefix_sum(moved, run)
    beta = tile.exp / (1.0 + tile.exp)
    return moved - beta * (farther + flow[..., None]), flow + total
