"""WSD: linear warmup, constant at the peak, decay (MiniCPM, arXiv 2404.06395).

`decay` is the length of the decay, `decay_shape` its form; published lengths are 10 to 20 percent
of the tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ScheduleConfig
from lm.schedules._schedule import Run, Schedule, warmup_stable_decay


def create(config: ScheduleConfig, run: Run) -> Schedule:
    peak = np.float32(config.peak_learning_rate)

    def stable(tokens: jax.Array) -> jax.Array:
        return jnp.full_like(tokens, peak)

    return warmup_stable_decay(config, run, stable)
