"""A short checksum of every array of a state. It changes if a bit flips or two values swap."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import params as params_lib

LARGE = 1 << 22  # elements of an array


def digest(state: Any) -> dict[str, int]:
    """One 32-bit checksum per array: the sum of its words, each times an odd number that depends on
    its place, so that a flipped bit and two swapped values both change the sum. Arrays stored in 16
    bits are summed as float32, the type they are restored as.
    """
    state = jax.tree.map(_near, state)
    devices = {d for x in jax.tree.leaves(state) if isinstance(x, jax.Array) for d in x.devices()}
    is_large = max(x.size for x in jax.tree.leaves(state)) >= LARGE
    is_alone = len(devices) == 1 and devices.pop().platform == "cpu"
    # XLA:CPU would materialize the product of a whole array, so a large one is summed in parts.
    sums = jax.device_get(_digest(state, parts=4096 if is_large and is_alone else 1))
    names = jax.tree.leaves(params_lib.names(state))
    return {name: int(x) for name, x in zip(names, jax.tree.leaves(sums), strict=True)}


def _near(x: Any) -> Any:
    """Moves arrays that live in host memory to the device, where they are summed."""
    if not isinstance(x, jax.Array) or x.sharding.memory_kind != "pinned_host":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


@functools.partial(jax.jit, static_argnames="parts")
def _digest(state: Any, parts: int) -> Any:
    def row(start: jax.Array, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32) if x.dtype.itemsize == 2 else x
        bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
        place = start + jnp.arange(bits.size, dtype=jnp.uint32)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    def leaf(x: jax.Array) -> jax.Array:
        count = math.gcd(x.size, parts)
        if count == 1:
            return row(jnp.uint32(0), x.reshape(-1))
        starts = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(x.size // count)
        sums = jax.lax.map(lambda xs: row(*xs), (starts, x.reshape(count, -1)))
        return jnp.sum(sums, dtype=jnp.uint32)

    return jax.tree.map(leaf, state)
