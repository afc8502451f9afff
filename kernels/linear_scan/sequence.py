"""Diagonal recurrences over a split time axis, by gathering what every rank does to the state.

The local form runs twice: from an empty state, of which what it leaves is read alone, and from the
state that enters. With a the product of the gates of a rank's tokens, or for n tokens lambda^n,

    gate, modes   h' = a h + left        log_sum   h' = log(exp(h) + exp(left))

and h' = left where the document that came in ends in the shard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.letters import Inputs
from kernels.linear_scan import tile
from kernels.linear_scan.tile import Modes
from kernels.primitives import head_exchange, state_gather
from kernels.primitives.state_gather import Places
from kernels.primitives.time_shards import Shards


class Parts(NamedTuple):
    """h of every channel; the imaginary part of modes alone."""

    re: Float[Array, "B H K N"]
    im: Float[Array, "B H K N"] | None


class Done(NamedTuple):
    """What a rank's tokens do to h. `came`: 1 where their last document is the one that came in;
    `some`: 1 where there are tokens, and not only padding; both else 0. `factor` is a, None for
    log_sum.
    """

    came: Float[Array, "B 1 1 1"]
    some: Float[Array, "B 1 1 1"]
    factor: Parts | None
    left: Parts


def _advance(done: Done, h: Parts) -> Parts:
    factor, left = done.factor, done.left
    if factor is None:
        both = jnp.where(done.came > 0, jnp.logaddexp(h.re, left.re), left.re)
        return Parts(jnp.where(done.some > 0, both, h.re), None)
    if factor.im is None or h.im is None or left.im is None:
        return Parts(done.came * factor.re * h.re + left.re, None)
    re, im = tile.turn(h.re, h.im, factor.re, factor.im)
    return Parts(done.came * re + left.re, done.came * im + left.im)


def _run(
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: Modes,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, Modes]:
    """Output of this rank's tokens, and the state after those of all ranks."""
    del op
    entry = shards.entry(segment_ids, state.segment)
    places = state_gather.places(segment_ids, entry, inputs["x"].shape[1])
    of = partial(_parts, is_complex=options["transition"] == "modes")
    empty = Modes(jnp.zeros_like(state.re), jnp.zeros_like(state.im), jnp.zeros_like(entry))
    _, left = local(inputs, segment_ids, empty)
    column = lambda x: x.astype(jnp.float32)[:, None, None, None]
    came, some = column(places.came[:, -1]), column(jnp.any(places.real, axis=1))
    done = Done(came, some, _factor(inputs, places), of(left))
    entered = state_gather.enter(_advance, shards, done, of(state))
    im = state.im if entered.im is None else entered.im
    out, after = local(inputs, segment_ids, Modes(entered.re, im, entry))
    return out, shards.last(after)


def _parts(state: Modes, *, is_complex: bool) -> Parts:
    return Parts(state.re, state.im if is_complex else None)


def _factor(inputs: Inputs, places: Places) -> Parts | None:
    """a of all tokens of a rank; padding does not count."""
    if "log_decay" in inputs:
        log_decay = inputs["log_decay"].astype(jnp.float32)
        total = jnp.sum(jnp.where(places.real[..., None, None], log_decay, 0.0), axis=1)
        return Parts(jnp.exp(total)[..., None], None)
    if "angle" in inputs:
        count = jnp.sum(places.real, axis=1, dtype=jnp.int32)
        modes = (inputs[name].astype(jnp.float32) for name in ("log_magnitude", "angle"))
        return _power(count, places.real.shape[1], *modes)
    return None


def _power(
    count: Int[Array, " B"],
    most: int,
    log_magnitude: Float[Array, "H K N"],
    angle: Float[Array, "H K N"],
) -> Parts:
    """lambda^count, of at most `most`: a product of the powers 2^k, whose angles have no rounding
    error (`tile`).
    """
    re = jnp.ones((count.shape[0], *angle.shape), jnp.float32)
    im = jnp.zeros_like(re)
    for bit in range(most.bit_length()):
        size = 2.0**bit
        magnitude = jnp.exp(size * log_magnitude)
        step = magnitude * jnp.cos(size * angle), magnitude * jnp.sin(size * angle)
        is_set: Bool[Array, "B 1 1 1"] = (((count >> bit) & 1) == 1)[:, None, None, None]
        far = tile.turn(re, im, *step)
        re, im = jnp.where(is_set, far[0], re), jnp.where(is_set, far[1], im)
    return Parts(re, im)


def _sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """One state a rank, and what multiplies it; the same for any T."""
    del op, itemsize
    channels = dims["B"] * dims["H"] * dims["K"]
    state = channels * (2 * dims["N"] if options["transition"] == "modes" else 1)
    factors = 0 if options["transition"] == "log_sum" else state
    return state_gather.sent(2 * dims["B"] + factors + state, state, ranks)


STRATEGIES = (Strategy("states", _run, _sent, takes_all, ("contiguous",)), head_exchange.ALL_TO_ALL)
