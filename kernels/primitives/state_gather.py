"""A recurrence over ranks (`rank_state`) by gathering what each rank does to the state (LASP-2, Sun
et al., arXiv 2502.07563, for decays; here for any map of a state).

`done` of all ranks is gathered once in the forward pass, and the cotangents of `entered` once in
the backward pass. Each rank then walks over all R of them by itself; for R up to some hundreds that
is little work beside its tokens. Rematerialization gathers `done` again, unless its policy keeps
`rank_state.STATES`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree

from kernels.contract import Sent
from kernels.primitives.rank_state import STATES, Advance
from kernels.primitives.time_shards import Shards


def enter(advance: Advance, shards: Shards, done: Any, first: Any) -> Any:
    """The state at this rank's first token; see `rank_state.Enter`."""
    return _enter(advance, shards, done, first)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _enter(advance: Advance, shards: Shards, done: Any, first: Any) -> Any:
    return _forward(advance, shards, done, first)[0]


def _forward(advance: Advance, shards: Shards, done: Any, first: Any) -> tuple[Any, Any]:
    every = checkpoint_name(_gather(shards, done), STATES)
    return _of_rank(shards, _walk(advance, every, first)), (every, first)


def _backward(
    advance: Advance, shards: Shards, saved: tuple[Any, Any], given: Any
) -> tuple[Any, Any]:
    _, pull = jax.vjp(partial(_walk, advance), *saved)
    d_every, d_first = pull(_gather(shards, given))
    # shard_map sums the cotangents of an array that is whole on every rank: only rank 0 adds one.
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
    """[B, ...] of every rank as [R, B, ...], with one message per rank."""
    flat, tree_of = ravel_pytree(tree)
    return jax.vmap(tree_of)(lax.all_gather(flat, shards.axes))


def sent(done: float, state: float, ranks: int) -> Sent:
    """Bytes sent by a rank whose `done` and state have this many numbers."""
    once = 4.0 * (ranks - 1)
    return Sent(once * done, once * state, 2 * (ranks - 1), {"all_gather": 2})
