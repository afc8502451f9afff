"""What a run carries from step to step, as one pytree of arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """`step` int32 []: completed optimizer steps, skipped ones included (their data was seen)."""

    step: jax.Array
    params: Any
    opt_state: Any


class Frozen(NamedTuple):
    """Arrays that a step reads, and neither differentiates nor saves with the run.

    `model` is what the modules read as Flax's collection "frozen", laid out as their parameters are
    (the matrix that an adapter adds to: `self.variable("frozen", "kernel", init)`); `objective` is
    any tree, read by the objective alone (the parameters of a teacher).
    """

    model: Any = None
    objective: Any = None


NOTHING = Frozen()
