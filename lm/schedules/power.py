"""Power: a learning rate that needs no token budget (Shen et al. 2024, arXiv 2408.13359).

    eta_power(n) = min(peak, batch * a * n^b),   batch = tokens_per_step / 4096

The law was fitted with batches counted in sequences of 4,096 tokens, hence the derived `batch`;
published constants: a = 4, b = -0.51, peak = 0.02. The warmup rises to eta_power(Nw), the decay
falls from eta_power(Ns) (_schedule.py).

Evaluated as peak * (max(n, knee) / knee)^b, the knee n* = (peak / (a batch))^(1/b) being where the
two meet: the base of the power is at least 1, so n = 0 is harmless, and float32 stays within 1e-6
of float64 up to 1e13 tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ScheduleConfig
from lm.schedules._schedule import Run, Schedule, warmup_stable_decay

SEQUENCE_LEN = 4096  # of the runs the published constants were fitted to


def knee(config: ScheduleConfig, tokens_per_step: int) -> float:
    """Tokens at which the power law falls below the peak."""
    batch = tokens_per_step / SEQUENCE_LEN
    return (config.peak_learning_rate / (config.a * batch)) ** (1.0 / config.b)


def create(config: ScheduleConfig, run: Run) -> Schedule:
    start = np.float32(knee(config, run.tokens_per_step))
    peak, exponent = np.float32(config.peak_learning_rate), np.float32(config.b)

    def stable(tokens: jax.Array) -> jax.Array:
        return peak * (jnp.maximum(tokens, start) / start) ** exponent

    return warmup_stable_decay(config, run, stable)
