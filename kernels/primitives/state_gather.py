"""Recurrences over a split time axis by gathering what every rank does to the state (LASP-2, Sun et
al., arXiv 2502.07563, for decays; here for any map of a state).

To a rank its tokens are one step of a recurrence over ranks. With `done` what they do,

    entered_0 = the carried state        entered_{r+1} = advance(done_r, entered_r)

for example advance((decay, left), S) = decay S + left. `done` and the state are of one size for any
T, so a rank sends the same few bytes however long rows are: `done` of all ranks is gathered once
forward (under rematerialization again), and the cotangents of `entered` once backward. Each rank
then walks over all R of them by itself, which for R up to some hundreds is little beside its
tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels import segments
from kernels.contract import Sent
from kernels.primitives.time_shards import Shards

type Advance = Callable[[Any, Any], Any]


def enter[S](advance: Callable[[Any, S], S], shards: Shards, done: Any, first: S) -> S:
    """The state at this rank's first token.

    `advance(done, state)` is the state after the tokens of a rank; `done` and the state are trees
    of float32 [B, ...]. `first`, the state before rank 0, is whole on every rank.
    """
    return _enter(advance, shards, done, first)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _enter(advance: Advance, shards: Shards, done: Any, first: Any) -> Any:
    return _forward(advance, shards, done, first)[0]


def _forward(advance: Advance, shards: Shards, done: Any, first: Any) -> tuple[Any, Any]:
    every = _gather(shards, done)
    return _of_rank(shards, _walk(advance, every, first)), (every, first)


def _backward(
    advance: Advance, shards: Shards, saved: tuple[Any, Any], given: Any
) -> tuple[Any, Any]:
    _, pull = jax.vjp(partial(_walk, advance), *saved)
    d_every, d_first = pull(_gather(shards, given))
    # What is whole on every rank has the sum over ranks as its cotangent.
    is_first = shards.rank() == 0
    return _of_rank(shards, d_every), jax.tree.map(lambda x: jnp.where(is_first, x, 0.0), d_first)


_enter.defvjp(_forward, _backward)


def _walk(advance: Advance, every: Any, first: Any) -> Any:
    """The state at the first token of every rank, [R, B, ...]."""
    return lax.scan(lambda s, done: (advance(done, s), s), first, every)[1]


def _of_rank(shards: Shards, every: Any) -> Any:
    own = partial(lax.dynamic_index_in_dim, index=shards.rank(), axis=0, keepdims=False)
    return jax.tree.map(own, every)


def _gather(shards: Shards, tree: Any) -> Any:
    """[B, ...] of every rank as [R, B, ...], in one message a rank."""
    leaves, structure = jax.tree.flatten(tree)
    batch = leaves[0].shape[0]
    flat = jnp.concatenate([x.reshape(batch, -1) for x in leaves], axis=1)
    every = lax.all_gather(flat, shards.axes)
    ends = np.cumsum([x.size // batch for x in leaves])[:-1]
    parts = jnp.split(every, ends, axis=2)
    found = [part.reshape(-1, *x.shape) for part, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


class Places(NamedTuple):
    """Tokens of the document that came in, those of the last one, and those that are no padding."""

    came: Bool[Array, "B T/R"]
    last: Bool[Array, "B T/R"]
    real: Bool[Array, "B T/R"]


def places(segment_ids: Int[Array, "B T/R"] | None, entry: Int[Array, " B"], time: int) -> Places:
    """Of a rank's tokens, the first of which continue `entry`; padding counts to the token before
    it.
    """
    belongs = segments.continued(segment_ids, entry, time)
    begun = segments.counted(belongs, entry)
    real = jnp.ones_like(begun, bool) if segment_ids is None else segment_ids != 0
    return Places(begun == 0, begun == begun[:, -1:], real)


def sent(done: float, state: float, ranks: int) -> Sent:
    """Bytes of a rank whose `done` and state are so many numbers."""
    once = 4.0 * (ranks - 1)
    return Sent(once * done, once * state, 2 * (ranks - 1), {"all_gather": 2})
