"""Learning rates as functions of tokens seen; one module a family, found by listing this folder.

A family module defines `create(config: ScheduleConfig, run: Run) -> Schedule`. Tokens are counted
before the update: the first step sees 0. Only calling a schedule touches a device.
"""

from __future__ import annotations

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.config import ScheduleConfig, UserError, nearest
from lm.schedules._schedule import Phases, Run, Schedule, branch_tokens

__all__ = ["Phases", "Run", "Schedule", "branch_tokens", "create", "names", "tokens_seen"]


def names() -> list[str]:
    """The families: modules of this folder without a leading underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def create(
    config: ScheduleConfig,
    *,
    run_tokens: float,
    tokens_per_step: int,
    decay_start: float | None = None,
) -> Schedule:
    """The schedule of a run of `run_tokens` tokens.

    With `decay_start`, the tokens a trunk checkpoint has seen, the decay begins there at the
    trunk's value and ends at `branch_tokens`; `run_tokens` then only measures a warmup given in
    percent.

    Raises:
      UserError: an unknown family, or values that contradict the family.
    """
    if config.family not in names():
        raise UserError(
            f"schedule.family={config.family!r} does not exist; {nearest(config.family, names())}"
        )
    family = importlib.import_module(f"{__name__}.{config.family}")
    return family.create(config, Run(run_tokens, tokens_per_step, decay_start))


def tokens_seen(step: ArrayLike, tokens_per_step: int) -> jax.Array:
    """Tokens seen after `step` updates, float32: a count of tokens does not fit into int32."""
    return jnp.asarray(step).astype(jnp.float32) * np.float32(tokens_per_step)
