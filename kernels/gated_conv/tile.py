"""A stretch of L tokens of a causal convolution, with the W - 1 tokens before it (its halo).

With z = [halo, x], weight [W, H, K], and `age` the number of tokens since the document started:

    y_t  = sum_{w < W} weight_w [W - 1 - w <= age_t] z_{t+w}
    dz_s = sum_{w < W} weight_w [W - 1 - w <= age_{s-w}] dy_{s-w}
    dweight_w = sum_t [W - 1 - w <= age_t] z_{t+w} dy_t

Each is W shifted multiply-adds that XLA fuses into one pass. All is float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tail(NamedTuple):
    """The state: the last W inputs of the row's document, the newest last, zeros before its start.

    The oldest of them is one more than the next token needs.
    """

    tail: Float[Array, "B H W K"]
    segment: Int[Array, " B"]


FIELDS = (("tail", "B H W K"), ("segment", "B"))


def convolve(
    z: Float[Array, "B W+L-1 H K"],
    weight: Float[Array, "W H K"],
    age: Int[Array, "B L"] | None,
) -> Float[Array, "B L H K"]:
    """The outputs of L tokens; `age` None is far from any start."""
    taps = weight.shape[0]
    length = z.shape[1] - taps + 1
    out = jnp.zeros((z.shape[0], length, *z.shape[2:]), jnp.float32)
    for w in range(taps):
        out = out + weight[w] * _reached(z[:, w : w + length], age, taps - 1 - w)
    return out


def spread(
    d_out: Float[Array, "B L H K"],
    weight: Float[Array, "W H K"],
    age: Int[Array, "B L"] | None,
) -> Float[Array, "B W+L-1 H K"]:
    """Cotangent of the tokens and of their halo."""
    taps, length = weight.shape[0], d_out.shape[1] + weight.shape[0] - 1
    around = ((0, 0), (taps - 1, taps - 1))
    d_out = jnp.pad(d_out, (*around, (0, 0), (0, 0)))
    age = None if age is None else jnp.pad(age, around)
    d_z = jnp.zeros((d_out.shape[0], length, *d_out.shape[2:]), jnp.float32)
    for w in range(taps):
        back = taps - 1 - w
        here = None if age is None else age[:, back : back + length]
        d_z = d_z + weight[w] * _reached(d_out[:, back : back + length], here, back)
    return d_z


def correlate(
    total: Float[Array, "B W H K"],
    z: Float[Array, "B W+L-1 H K"],
    d_out: Float[Array, "B L H K"],
    age: Int[Array, "B L"] | None,
) -> Float[Array, "B W H K"]:
    """`total` plus the cotangent of the weight, kept apart by row.

    The sum over tokens is L additions of [W, H, K]: a reduction over time for every tap takes
    XLA:CPU several times as long.
    """
    taps = total.shape[1]
    distance = jnp.arange(taps - 1, -1, -1)[:, None, None]
    for t in range(d_out.shape[1]):
        reached = z[:, t : t + taps]
        if age is not None:
            reached = jnp.where(distance <= age[:, t, None, None, None], reached, 0.0)
        total = total + reached * d_out[:, t : t + 1]
    return total


def _reached(x: Array, age: Array | None, distance: int) -> Array:
    """`x` where a tap this far back is inside the document."""
    if age is None or distance == 0:
        return x
    return jnp.where((distance <= age)[..., None, None], x, 0.0)
