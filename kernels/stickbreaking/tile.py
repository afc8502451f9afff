"""One tile of stick-breaking attention: rows of queries against one block of keys.

With `left` the sum of softplus over nearer keys in blocks already visited, strict within the tile:

    log A_j = z_j - softplus(z_j) - sum_{l > j} softplus(z_l) - left            all of it <= 0
    dz_j = sigmoid(-z_j) G_j - sigmoid(z_j) (sum_{l < j} G_l + flow)          G = A (dO V^T)

where `flow` holds the G of farther keys and the cotangent of log rem. All is float32. Sums
along keys are made by the form: they depend on how keys lie in its tiles. (With G_j in the sum the
first term would be G_j, and where sigmoid(z_j) is nearly 1 the difference would have no digits.)
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.contract import Options
from kernels.letters import Inputs

# A finite stand-in for -inf: softplus, its exponential and the weight are then exactly 0.
MASKED = -1e30


def mask(products: Float[Array, "*tile"], seen: Bool[Array, "*tile"]) -> Float[Array, "*tile"]:
    """Logits of one tile from scale q k."""
    return jnp.where(seen, products, MASKED)


def weigh(
    log_beta: Float[Array, "*tile"], nearer: Float[Array, "*tile"], exp: Callable[[Array], Array]
) -> Float[Array, "*tile"]:
    """The weights of one tile; `nearer` is `left` and the sum within the tile, in logarithms of
    which `exp` is the inverse.
    """
    return exp(log_beta - nearer)


def logit_cotangent(
    moved: Float[Array, "*tile"],
    beta: Float[Array, "*tile"],
    kept: Float[Array, "*tile"],
    farther: Float[Array, "*tile"],
) -> Float[Array, "*tile"]:
    """Cotangent of the logits from G; `kept` is 1 - beta, `farther` is `flow` and the sum of the G
    of farther keys within the tile.
    """
    return kept * moved - beta * farther


def rest(inputs: Inputs, options: Options) -> Float[Array, "*B T H V"]:
    """What takes the unbroken rest of the stick."""
    if options["remainder"] == "bias":
        return inputs["remainder_bias"].astype(jnp.float32)
    ratio = inputs["q"].shape[2] // inputs["v"].shape[2]
    return jnp.repeat(inputs["v"].astype(jnp.float32), ratio, axis=2)
