"""What a run carries from step to step, as one pytree of arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """`step` int32 []: completed optimizer steps, skipped ones included (their data was seen)."""

    step: jax.Array
    params: Any
    opt_state: Any
