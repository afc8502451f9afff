"""One tile of stick-breaking attention: rows of queries against one block of keys, in float32.

Let `left` be the sum of softplus over nearer keys in blocks already visited. Sums within the tile
are strict, that is without key j itself:

    log A_j = z_j - softplus(z_j) - sum_{l > j} softplus(z_l) - left            all of it <= 0
    dz_j = sigmoid(-z_j) G_j - sigmoid(z_j) (sum_{l < j} G_l + flow)          G = A (dO V^T)

where `flow` holds the G of farther keys and the cotangent of log rem. Each form computes sums along
keys itself, because they depend on the order of keys in its tiles. (If the sum contained G_j, the
first term would be G_j, and where sigmoid(z_j) is nearly 1 the difference would lose its digits.)
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.contract import Options
from kernels.letters import Inputs

# A finite stand-in for -inf: softplus, its exponential and the weight are then exactly 0.
MASKED = -1e30


def mask(products: Float[Array, "*tile"], seen: Bool[Array, "*tile"]) -> Float[Array, "*tile"]:
    """The logits of one tile, from scale q k."""
    return jnp.where(seen, products, MASKED)


def weigh(
    log_beta: Float[Array, "*tile"], nearer: Float[Array, "*tile"], exp: Callable[[Array], Array]
) -> Float[Array, "*tile"]:
    """The weights of one tile. `nearer` is `left` plus the sum within the tile, in logarithms of
    the base for which `exp` is the exponential.
    """
    return exp(log_beta - nearer)


def logit_cotangent(
    moved: Float[Array, "*tile"],
    beta: Float[Array, "*tile"],
    kept: Float[Array, "*tile"],
    farther: Float[Array, "*tile"],
) -> Float[Array, "*tile"]:
    """The cotangent of the logits, from G (`moved`). `kept` is 1 - beta; `farther` is `flow` plus
    the sum of G over farther keys within the tile.
    """
    return kept * moved - beta * farther


def rest(inputs: Inputs, options: Options) -> Float[Array, "*B T H V"]:
    """What the remainder of the stick is multiplied by: a bias, or the token's own value."""
    if options["remainder"] == "bias":
        return inputs["remainder_bias"].astype(jnp.float32)
    ratio = inputs["q"].shape[2] // inputs["v"].shape[2]
    return jnp.repeat(inputs["v"].astype(jnp.float32), ratio, axis=2)
