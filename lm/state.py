"""What a run carries from step to step, as one pytree of arrays.

A number of tokens can exceed int32, and exceed the integers that float32 represents exactly. It is
therefore counted in two words, int32 [2]:

    high * 2^24 + low,   0 <= low < 2^24      2^40 + 5 tokens are [65536, 5]

This is exact below 2^55. Converted to float32 it is rounded once, to nearest (below 2^48, where
`high` is exact).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOW = 24  # bits of the low word


class TrainState(NamedTuple):
    """`step` int32 []: completed optimizer steps, including skipped ones, whose data was seen too.
    `tokens` and `rows`, int32 [2]: how many these steps took, padding included.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    tokens: jax.Array
    rows: jax.Array


def count(number: int) -> np.ndarray:
    """A number as int32 [2]."""
    return np.array(divmod(number, 1 << LOW), np.int32)


def added(counted: jax.Array, number: int) -> jax.Array:
    """The count plus `number`."""
    high, low = count(number)
    low = counted[1] + low  # below 2^25
    return jnp.stack([counted[0] + high + (low >> LOW), low & ((1 << LOW) - 1)])


def as_float(counted: jax.Array) -> jax.Array:
    """The count as float32 []."""
    high, low = counted.astype(jnp.float32)
    return high * np.float32(1 << LOW) + low


def as_int(counted: Any) -> int:
    """The count as a Python integer, on the host."""
    high, low = (int(word) for word in np.asarray(counted))
    return (high << LOW) + low


class Frozen(NamedTuple):
    """Arrays that a step reads but neither differentiates nor saves with the run.

    `model` is what modules read as Flax's collection "frozen", laid out like their parameters. An
    example is the matrix that an adapter adds to: `self.variable("frozen", "kernel", init)`.
    `objective` is any tree that the objective reads, such as the parameters of a teacher. Runs of
    lm/train.py do not use either yet.
    """

    model: Any = None
    objective: Any = None


NOTHING = Frozen()
