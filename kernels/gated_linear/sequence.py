"""Linear attention with decay over a split time axis. LASP-2 (Sun et al., arXiv 2502.07563) gathers
what every rank does to the state; the All-Scan of ZeCO (arXiv 2507.01004) passes the state on.

Let S be the state that enters a rank, decay(i..j) the product of the decays of its tokens i to j,
and `out` and M what the local form returns from an empty state. Then

    o_i = out_i + (scale decay(1..i) q_i) S        S' = decay(1..T/R) S + M
    M   = sum_j (decay(j+1..T/R) k_j) v_j^T

M is also one product of all keys and values, which need not wait for the local form: it is sent
while that runs. Tokens after the start of a document inside the shard read nothing of S. M counts
only the last document, and decay(1..T/R) is 0 where that is not the document that came in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.gated_linear.tile import GatedState
from kernels.letters import Inputs
from kernels.primitives import head_exchange, rank_state, state_gather, state_scan
from kernels.primitives.products import EXACT
from kernels.primitives.rank_state import Enter, Places
from kernels.primitives.time_shards import Shards


class Done(NamedTuple):
    """What a rank's tokens do to the state: multiply it by a decay, and add to it."""

    decay: Float[Array, "B h k 1"]
    added: Float[Array, "B H K V"]


def _advance(done: Done, s: Float[Array, "B H K V"]) -> Float[Array, "B H K V"]:
    return done.decay * s + done.added


def _run(
    enter: Enter,
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: GatedState,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, GatedState]:
    """The output of this rank's tokens, and the state after the tokens of all ranks."""
    del op
    entry = shards.entry(segment_ids, state.segment)
    places = rank_state.places(segment_ids, entry, inputs["k"].shape[1])
    done = jax.checkpoint(_do)(inputs, places)
    s = enter(_advance, shards, done, state.s)
    own = local(inputs, segment_ids, GatedState(jnp.zeros_like(s), entry))
    read = jax.checkpoint(partial(_read, scale=options["scale"]))(inputs, places, s)
    return rank_state.add_entered(own, read, done.decay * s, shards)


def _do(inputs: Inputs, places: Places) -> Done:
    """What the tokens of a rank do to the state."""
    k, v = (inputs[name].astype(jnp.float32) for name in "kv")
    k = jnp.where((places.last & places.real)[..., None, None], k, 0.0)
    is_through = places.came[:, -1:, None, None].astype(jnp.float32)
    if (log_decay := _log_decay(inputs, places)) is None:
        return Done(is_through, _outer(k, v))
    until = jnp.cumsum(log_decay[:, ::-1], axis=1)[:, ::-1]
    # Not until - log_decay: after a large decay the difference would have few digits left.
    rest = jnp.exp(jnp.pad(until[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))))
    return Done(is_through * jnp.exp(until[:, 0])[..., None], _outer(rest * k, v))


def _outer(k: Float[Array, "B T H K"], v: Float[Array, "B T H V"]) -> Float[Array, "B H K V"]:
    by_head = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    return EXACT.tn(*by_head)


def _read(
    inputs: Inputs, places: Places, s: Float[Array, "B H K V"], *, scale: float
) -> Float[Array, "B T H V"]:
    """What the tokens read from the state that enters."""
    q = scale * inputs["q"].astype(jnp.float32)
    if (log_decay := _log_decay(inputs, places)) is not None:
        q = jnp.exp(jnp.cumsum(log_decay, axis=1)) * q
    q = jnp.where((places.came & places.real)[..., None, None], q, 0.0)
    return jnp.moveaxis(EXACT.nn(jnp.moveaxis(q, 2, 1), s), 1, 2)


def _log_decay(inputs: Inputs, places: Places) -> Float[Array, "B T H #K"] | None:
    """The log decay, zero on padding; None if there is no decay."""
    if "log_decay" not in inputs:
        return None
    x = inputs["log_decay"].astype(jnp.float32)
    x = x[..., None] if x.ndim == 3 else x
    return jnp.where(places.real[..., None, None], x, 0.0)


def _gathered(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """The state and the decay of each rank; independent of T."""
    del op, itemsize
    per_row = {"none": 1, "scalar": dims["H"], "vector": dims["H"] * dims["K"]}
    done = _numbers(dims) + dims["B"] * per_row[options["decay"]]
    return state_gather.sent(done, _numbers(dims), ranks)


def _handed_on(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """One state; independent of T."""
    del op, options, itemsize
    return state_scan.sent(_numbers(dims), dims["K"], ranks)


def _numbers(dims: Dims) -> int:
    """The number of numbers in the state."""
    return dims["B"] * dims["H"] * dims["K"] * dims["V"]


_by_rows = partial(state_scan.enter, state_scan.Cut(axis=2))
STRATEGIES = (
    Strategy("states", partial(_run, state_gather.enter), _gathered, takes_all, ("contiguous",)),
    Strategy("scan", partial(_run, _by_rows), _handed_on, takes_all, ("contiguous",)),
    head_exchange.ALL_TO_ALL,
)
