"""The delta rule over a split time axis, by gathering what every rank does to the memory.

A token maps the memory to P S + H, with P = decay (I - beta k k^T), and so do a rank's tokens. With
`out` and H what the local form gives from an empty memory, and `read` and P from the unit matrix
and values that are zero,

    o_i = out_i + S^T read_i        S' = P S + H

Only P S is ever taken, never P P. Where a document starts inside the shard, the local form itself
gives P = 0 and `read` 0 from there on. All of P is float32: of products of many maps bfloat16 keeps
two digits after 16 tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.delta_rule.tile import Memory
from kernels.letters import Inputs
from kernels.primitives import head_exchange, state_gather
from kernels.primitives.products import EXACT
from kernels.primitives.time_shards import Shards


class Done(NamedTuple):
    """What a rank's tokens do to the memory."""

    map: Float[Array, "B H K K"]
    added: Float[Array, "B H K V"]


def _advance(done: Done, s: Float[Array, "B H K V"]) -> Float[Array, "B H K V"]:
    return EXACT.nn(done.map, s) + done.added


def _run(
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: Memory,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, Memory]:
    """Output of this rank's tokens, and the memory after those of all ranks."""
    del op, options  # the local form knows them
    entry = shards.entry(segment_ids, state.segment)
    width = inputs["k"].shape[3]
    unit = jnp.broadcast_to(jnp.eye(width), (*state.s.shape[:2], width, width))
    silent = inputs | {"v": jnp.zeros_like(inputs["k"])}
    read, mapped = local(silent, segment_ids, Memory(unit, entry))
    out, left = local(inputs, segment_ids, Memory(jnp.zeros_like(state.s), entry))
    s = state_gather.enter(_advance, shards, Done(mapped.s, left.s), state.s)
    wide = jnp.moveaxis(read.astype(jnp.float32), 2, 1)
    recalled = jnp.moveaxis(EXACT.nn(wide, s), 1, 2)
    after = Memory(EXACT.nn(mapped.s, s) + left.s, left.segment)
    return (out.astype(jnp.float32) + recalled).astype(out.dtype), shards.last(after)


def _sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """P and H of a rank, and the cotangent of one memory; the same for any T."""
    del op, options, itemsize
    state = dims["B"] * dims["H"] * dims["K"] * dims["V"]
    return state_gather.sent(state + dims["B"] * dims["H"] * dims["K"] ** 2, state, ranks)


STRATEGIES = (Strategy("states", _run, _sent, takes_all, ("contiguous",)), head_exchange.ALL_TO_ALL)
