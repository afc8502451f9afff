"""Causal convolution over a split time axis: a rank's first tokens need the last W - 1 inputs of
the ranks before it (the halo). The local form continues them as its state.

Where rows have documents, a shard may hold fewer than W - 1 tokens of the document that continues
after it, or only padding, over which taps reach. So a halo may come from ranks further away. What
two neighboring stretches of tokens leave to those after them combines associatively:

    left(far, near) = the last W inputs of [far, near]   if the document at far's end fills near
                      what near leaves                   otherwise

A rank receives what the rank before it leaves, then what the 1, 2, 4, ... ranks before that one
leave. That takes at most 1 + ceil(log2 R) messages of W inputs. A single message is enough where
every row is one document and a shard holds W - 1 tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import segments
from kernels.contract import Dims, Op, Options, Sent, Strategy, takes_all
from kernels.gated_conv import tile
from kernels.gated_conv.tile import Tail
from kernels.letters import Inputs
from kernels.primitives import gaps, head_exchange
from kernels.primitives.time_shards import Shards


class Left(NamedTuple):
    """What a stretch of tokens leaves: the last W inputs of its last document (zeros where it has
    fewer), their number, and whether that document already came in at the stretch's first token.
    """

    tail: Float[Array, "B W H K"]
    count: Int[Array, " B"]
    came: Bool[Array, " B"]


def _run(
    local: Callable[..., tuple[Array, Any]],
    inputs: Inputs,
    segment_ids: Int[Array, "B T/R"] | None,
    state: Tail,
    shards: Shards,
    *,
    op: Op,
    options: Options,
) -> tuple[Array, Tail]:
    """The output of this rank's tokens, and the state after the tokens of all ranks."""
    del op, options  # the local form knows them
    x, taps = inputs["x"], inputs["weight"].shape[-1]
    entry = shards.entry(segment_ids, state.segment)
    before = shards.from_before(_leave(x, segment_ids, entry, taps), 1)
    is_first = shards.rank() == 0
    carried = Left(
        jnp.moveaxis(state.tail, 2, 1), jnp.full_like(entry, taps), jnp.zeros_like(entry, bool)
    )
    before = Left(*(jnp.where(is_first, *pair) for pair in zip(carried, before, strict=True)))
    reach = 1
    while reach < shards.count and not _suffices(reach, x.shape[1], taps, segment_ids):
        far = shards.from_before(before, reach)
        is_there = shards.rank() >= reach
        pairs = zip(_compose(far, before), before, strict=True)
        before = Left(*(jnp.where(is_there, *pair) for pair in pairs))
        reach *= 2
    out, after = local(inputs, segment_ids, Tail(jnp.moveaxis(before.tail, 1, 2), entry))
    return out, shards.last(after)


def _suffices(reach: int, time: int, taps: int, segment_ids: Array | None) -> bool:
    """Whether `reach` shards of `time` tokens hold every halo, whatever the documents are."""
    return segment_ids is None and reach * time >= taps - 1


def _leave(x: Array, segment_ids: Array | None, entry: Int[Array, " B"], taps: int) -> Left:
    """What the tokens of this shard leave."""
    batch, time = x.shape[:2]
    nothing = jnp.zeros((batch, taps, *x.shape[2:]), jnp.float32)
    belongs = segments.continued(segment_ids, entry, time)
    if segment_ids is None:
        count = jnp.full((batch,), min(time, taps), jnp.int32)
        return Left(tile.next_tail(x, nothing, None), count, belongs[:, 0] == entry)
    line = tile.line(segment_ids, belongs, entry, taps)
    first = tile.first_number(line)[:, 0]
    count = jnp.clip(line.places.count[:, -1] - jnp.maximum(first, 0), 0, taps)
    return Left(tile.next_tail(x, nothing, line), count, first < 0)


def _compose(far: Left, near: Left) -> Left:
    """What two stretches leave together; `near` comes right after `far`."""
    taps = near.tail.shape[1]
    place = jnp.arange(taps, dtype=jnp.int32) + near.count[:, None]
    moved = gaps.take(far.tail, jnp.minimum(place, taps - 1))
    is_far = near.came[:, None] & (place < taps)
    count = jnp.where(near.came, jnp.minimum(near.count + far.count, taps), near.count)
    tail = jnp.where(is_far[..., None, None], moved, near.tail)
    return Left(tail, count, near.came & far.came)


def _sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """What a rank sends for packed rows, in float32 like the state."""
    del op, options, itemsize
    messages = 1 + (ranks - 1).bit_length()
    tails = 4.0 * messages * dims["B"] * dims["H"] * dims["W"] * dims["K"]
    return Sent(tails, tails, 2 * messages, {"ppermute": 2 * messages})


STRATEGIES = (Strategy("halo", _run, _sent, takes_all, ("contiguous",)), head_exchange.ALL_TO_ALL)
