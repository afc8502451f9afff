"""Learning rates as functions of tokens seen; one file a schedule, found by listing this folder.

A file holds one frozen dataclass, named as the file in camel case, which derives from `Rule` (or
from `Phased`: warmup, stable phase, decay). Its fields with defaults are its options; given the
length of a run, `schedule(run)` is the learning rate. Tokens are counted before the update: the
first step sees 0. Only calling a schedule touches a device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.schedules._schedule import Phased, Phases, Rule, Run, Schedule, branch_tokens

__all__ = ["Phased", "Phases", "Rule", "Run", "Schedule", "branch_tokens", "tokens_seen"]


def tokens_seen(step: ArrayLike, tokens_per_step: int) -> jax.Array:
    """Tokens seen after `step` updates, float32: a count of tokens does not fit into int32."""
    return jnp.asarray(step).astype(jnp.float32) * np.float32(tokens_per_step)
