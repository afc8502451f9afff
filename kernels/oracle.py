"""Code that the references share: the dtype they compute in, and a simple, slow cache of keys and
values for attention.

Only references import this. The forms use `primitives/kv_cache.py`, which is tested against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Cache
from kernels.letters import Inputs

HIGHEST = jax.lax.Precision.HIGHEST


def wide(x: Array) -> Array:
    """x in float32, or in float64 if it already is: a reference judges in the type it is given."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def continued(state: Cache, segment_ids: Array | None, time: int) -> Array:
    """The documents of the new tokens; without ids, they continue the row's last document."""
    if segment_ids is not None:
        return segment_ids
    row = jnp.arange(state.length.shape[0])
    current = jnp.maximum(state.segment_ids[row, jnp.maximum(state.length - 1, 0)], 1)
    return jnp.broadcast_to(current[:, None], (row.shape[0], time))


def written(state: Cache, inputs: Inputs, segment_ids: Array, slot: Array) -> Cache:
    """The cache with every token written to its slot, by multiplying with a permutation."""
    source = jnp.arange(state.k.shape[1])
    place = (slot[:, :, None] == source) & (segment_ids != 0)[:, :, None]
    taken = jnp.any(place, axis=1)
    once = place.astype(jnp.float32)

    def put(new: Array, old: Array) -> Array:
        moved = jnp.einsum("bts,btgk->bsgk", once, wide(new), precision=HIGHEST)
        return jnp.where(taken[..., None, None], moved.astype(old.dtype), old)

    moved = jnp.sum(jnp.where(place, segment_ids[:, :, None], 0), axis=1)
    return state._replace(  # pyright: ignore[reportPrivateUsage] (public for named tuples)
        k=put(inputs["k"], state.k),
        v=put(inputs["v"], state.v),
        segment_ids=jnp.where(taken, moved, state.segment_ids),
        length=state.length + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32),
    )
