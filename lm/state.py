"""What a run carries from step to step, as one pytree of arrays.

A number of tokens outgrows int32, and the integers that float32 holds. It is counted in int32 [2],

    high * 2^24 + low,   0 <= low < 2^24      2^40 + 5 tokens are [65536, 5]

exact below 2^55. As float32 it is rounded once, to the nearest (below 2^48, where `high` is exact).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOW = 24  # bits of the low word


class TrainState(NamedTuple):
    """`step` int32 []: completed optimizer steps, skipped ones included (their data was seen).
    `tokens` and `rows` that they took, padding included: counts, int32 [2].
    """

    step: jax.Array
    params: Any
    opt_state: Any
    tokens: jax.Array
    rows: jax.Array


def count(number: int) -> np.ndarray:
    """As int32 [2]."""
    return np.array(divmod(number, 1 << LOW), np.int32)


def added(counted: jax.Array, number: int) -> jax.Array:
    """`number` more."""
    high, low = count(number)
    low = counted[1] + low  # below 2^25
    return jnp.stack([counted[0] + high + (low >> LOW), low & ((1 << LOW) - 1)])


def as_float(counted: jax.Array) -> jax.Array:
    """float32 []."""
    high, low = counted.astype(jnp.float32)
    return high * np.float32(1 << LOW) + low


def as_int(counted: Any) -> int:
    """On the host."""
    high, low = (int(word) for word in np.asarray(counted))
    return (high << LOW) + low


class Frozen(NamedTuple):
    """Arrays that a step reads, and neither differentiates nor saves with the run.

    `model` is what the modules read as Flax's collection "frozen", laid out as their parameters are
    (the matrix that an adapter adds to: `self.variable("frozen", "kernel", init)`); `objective` is
    any tree, read by the objective alone (the parameters of a teacher). A run of lm/train.py has
    none; what gives it some is to come.
    """

    model: Any = None
    objective: Any = None


NOTHING = Frozen()
