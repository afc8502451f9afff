"""Recurrences over a split time axis: the tokens of a rank are one step of a recurrence over ranks.

Let `done` describe what a rank's tokens do to the state. Then

    entered_0 = the carried state        entered_{r+1} = advance(done_r, entered_r)

for example advance((decay, left), S) = decay S + left. The sizes of `done` and of the state do not
depend on T, so a rank sends the same few bytes however long the rows are. `state_gather` and
`state_scan` are two ways to compute the state that enters a rank; each is an `Enter`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import segments
from kernels.contract import Memory
from kernels.primitives.time_shards import Shards

# The name (`jax.ad_checkpoint.checkpoint_name`) of what an `Enter` received and its backward pass
# needs. With a remat policy that keeps this name, nothing is received twice.
STATES = "states"

# `advance(done, state)` is the state after the tokens of a rank; `done` and the state are pytrees
# of float32 [B, ...].
type Advance = Callable[[Any, Any], Any]
# `enter(advance, shards, done, first)` is the state at this rank's first token. `first`, the state
# before rank 0, is whole on every rank.
type Enter = Callable[[Advance, Shards, Any, Any], Any]


class Places(NamedTuple):
    """Which of a rank's tokens belong to the document that came in, which to the rank's last
    document, and which are not padding.
    """

    came: Bool[Array, "B T/R"]
    last: Bool[Array, "B T/R"]
    real: Bool[Array, "B T/R"]


def places(segment_ids: Int[Array, "B T/R"] | None, entry: Int[Array, " B"], time: int) -> Places:
    """The places of a rank's tokens; the first of them continue the document `entry`. Padding
    belongs to the document before it.
    """
    belongs = segments.continued(segment_ids, entry, time)
    begun = segments.counted(belongs, entry)
    real = jnp.ones_like(begun, bool) if segment_ids is None else segment_ids != 0
    return Places(begun == 0, begun == begun[:, -1:], real)


def add_entered[S: Memory](
    local: tuple[Array, S],
    read: Float[Array, "B T/R H V"],
    rest: Float[Array, "B H K V"],
    shards: Shards,
) -> tuple[Array, S]:
    """The output of a rank's tokens and the state after all ranks, for an op that is linear in its
    state. `local` is what the local form returns from an empty state, `read` is what the tokens
    read from the state that enters, `rest` is what remains of that state after them.
    """
    out, left = local
    total = (out.astype(jnp.float32) + read).astype(out.dtype)
    after = left._replace(s=rest + left.s)  # pyright: ignore[reportPrivateUsage] (public)
    return total, shards.last(after)
