"""Diagonal recurrences over a split time axis: either gather what every rank does to the state, or
pass the state from rank to rank, some channels at a time.

The local form runs twice. The first run starts from an empty state, and only the state it leaves
(`left`) is used. The second run starts from the state that enters. Let a be the product of the
gates of a rank's tokens, or lambda^n for n tokens. Then

    gate, modes   h' = a h + left        log_sum   h' = log(exp(h) + exp(left))

and h' = left where the document that came in ends inside the shard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.letters import Inputs
from kernels.linear_scan import tile
from kernels.linear_scan.tile import Modes
from kernels.primitives import head_exchange, rank_state, state_gather, state_scan
from kernels.primitives.rank_state import Enter, Places
from kernels.primitives.time_shards import Shards


class Parts(NamedTuple):
    """h of every channel; only modes have an imaginary part."""

    re: Float[Array, "B H K N"]
    im: Float[Array, "B H K N"] | None


class Done(NamedTuple):
    """What a rank's tokens do to h. `came` is 1 where their last document is the one that came in;
    `some` is 1 where there are tokens and not only padding; both are 0 otherwise. `factor` is a,
    and None for log_sum.
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
    enter: Enter,
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: Modes,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, Modes]:
    """The output of this rank's tokens, and the state after the tokens of all ranks."""
    del op
    entry = shards.entry(segment_ids, state.segment)
    places = rank_state.places(segment_ids, entry, inputs["x"].shape[1])
    of = partial(_parts, is_complex=options["transition"] == "modes")
    empty = Modes(jnp.zeros_like(state.re), jnp.zeros_like(state.im), jnp.zeros_like(entry))
    # Saves nothing for so small a result: the backward pass runs this call again.
    left = jax.checkpoint(lambda *given: local(*given)[1])(inputs, segment_ids, empty)
    column = lambda x: x.astype(jnp.float32)[:, None, None, None]
    came, some = column(places.came[:, -1]), column(jnp.any(places.real, axis=1))
    done = Done(came, some, _factor(inputs, places), of(left))
    entered = enter(_advance, shards, done, of(state))
    im = state.im if entered.im is None else entered.im
    out, after = local(inputs, segment_ids, Modes(entered.re, im, entry))
    return out, shards.last(after)


def _parts(state: Modes, *, is_complex: bool) -> Parts:
    return Parts(state.re, state.im if is_complex else None)


def _factor(inputs: Inputs, places: Places) -> Parts | None:
    """The product a of the gates of a rank's tokens; padding does not count."""
    if "log_decay" in inputs:
        log_decay = inputs["log_decay"].astype(jnp.float32)
        total = jnp.sum(jnp.where(places.real[..., None, None], log_decay, 0.0), axis=1)
        return Parts(jnp.exp(total)[..., None], None)
    if "angle" in inputs:
        count = jnp.sum(places.real, axis=1, dtype=jnp.int32)
        modes = (inputs[name].astype(jnp.float32) for name in ("log_magnitude", "angle"))
        return Parts(*tile.powers(count, places.real.shape[1], *modes))
    return None


def _gathered(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """The state of each rank and the factor on it; independent of T."""
    del op, itemsize
    state = _numbers(dims, options)
    factors = 0 if options["transition"] == "log_sum" else state
    return state_gather.sent(2 * dims["B"] + factors + state, state, ranks)


def _handed_on(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """One state; independent of T."""
    del op, itemsize
    return state_scan.sent(_numbers(dims, options), dims["K"], ranks)


def _numbers(dims: Dims, options: Options) -> int:
    """The number of numbers in the state."""
    each = 2 * dims["N"] if options["transition"] == "modes" else 1
    return dims["B"] * dims["H"] * dims["K"] * each


_by_channels = partial(state_scan.enter, state_scan.Cut(axis=2))
STRATEGIES = (
    Strategy("states", partial(_run, state_gather.enter), _gathered, takes_all, ("contiguous",)),
    Strategy("scan", partial(_run, _by_channels), _handed_on, takes_all, ("contiguous",)),
    head_exchange.ALL_TO_ALL,
)
