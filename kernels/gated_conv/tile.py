"""L tokens of a causal convolution, with the W - 1 tokens before them (the halo).

With z = [halo, x], weight [W, H, K], and `age` the number of tokens since the document started:

    y_t  = sum_{w < W} weight_w [W - 1 - w <= age_t] z_{t+w}
    dz_s = sum_{w < W} weight_w [W - 1 - w <= age_{s-w}] dy_{s-w}
    dweight_w = sum_t [W - 1 - w <= age_t] z_{t+w} dy_t

Each is W shifted multiply-adds that XLA fuses into one pass. Everything is float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.primitives import gaps
from kernels.primitives.gaps import Gaps


class Tail(NamedTuple):
    """The state: the last W inputs of the row's document, newest last, with zeros before its start.

    The next token needs only W - 1 of them; the oldest is not read.
    """

    tail: Float[Array, "B H W K"]
    segment: Int[Array, " B"]


FIELDS = (("tail", "B H W K"), ("segment", "B"))


class Line(NamedTuple):
    """The places of tokens, and how many tokens of its document are before each one (at least W in
    the document that came in)."""

    places: Gaps
    age: Int[Array, "B T"]


def line(
    segment_ids: Int[Array, "B T"], belongs: Int[Array, "B T"], entry: Int[Array, " B"], taps: int
) -> Line:
    """`belongs` is `segments.continued` of the ids and of the document at the entry."""
    places = gaps.gaps(segment_ids, belongs, entry)
    starts = belongs != segments.previous(belongs, entry)
    start = jnp.where(starts, places.count - 1, -taps)
    return Line(places, places.count - 1 - lax.cummax(start, axis=1))


def next_tail(
    x: Float[Array, "B T H K"], old: Float[Array, "B W H K"], line: Line | None
) -> Float[Array, "B W H K"]:
    """The last W inputs of each row's document, with zeros before its start. `old` are those at the
    entry; `line` None means one document without padding.
    """
    taps, time = old.shape[1], x.shape[1]
    if line is None:
        recent = x[:, max(time - taps, 0) :].astype(jnp.float32)
        return jnp.concatenate([old, recent], axis=1)[:, -taps:]
    total = line.places.count[:, -1:]
    number = total - taps + jnp.arange(taps, dtype=jnp.int32)
    new = gaps.take(x, gaps.find(line.places, jnp.maximum(number, 0))).astype(jnp.float32)
    kept = gaps.take(old, jnp.minimum(number + taps, taps - 1))
    tail = jnp.where((number >= 0)[..., None, None], new, kept)
    return jnp.where((number >= first_number(line))[..., None, None], tail, 0.0)


def first_number(line: Line) -> Int[Array, "B 1"]:
    """The number, from 0 in this call, of the first token of each row's last document; negative if
    that document came in."""
    return line.places.count[:, -1:] - 1 - line.age[:, -1:]


def convolve(
    z: Float[Array, "B W+L-1 H K"],
    weight: Float[Array, "W H K"],
    age: Int[Array, "B L"] | None,
) -> Float[Array, "B L H K"]:
    """The outputs of L tokens; `age` None means that no document starts nearby."""
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
    """The cotangents of the tokens and of their halo."""
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
    """`total` plus the cotangent of the weight, separately for each row of the batch.

    The sum over tokens is L additions of [W, H, K]. Reducing over time for every tap instead takes
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
    """`x`, with zeros where a tap this far back is outside the document."""
    if age is None or distance == 0:
        return x
    return jnp.where((distance <= age)[..., None, None], x, 0.0)
