"""Step sizes and decay rates of state-space layers, drawn as in the published initializations.

dt = softplus(x + dt_bias), dt_bias = softplus^-1(exp U(log low, log high))     Mamba-2's
log dt = U(log low, log high)                                                   S4D's
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LOW, HIGH, FLOOR = 1e-3, 1e-1, 1e-4


def log_dt(key: jax.Array, shape: tuple[int, ...], *args: Any) -> jax.Array:
    """An initializer of log dt, uniform between log 0.001 and log 0.1."""
    del args
    return jax.random.uniform(key, shape, minval=math.log(LOW), maxval=math.log(HIGH))


def dt_bias(key: jax.Array, shape: tuple[int, ...], *args: Any) -> jax.Array:
    """An initializer of the bias with which softplus gives such a dt, at least 0.0001."""
    dt = jnp.maximum(jnp.exp(log_dt(key, shape, *args)), FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


def log_uniform(low: float, high: float) -> Callable[..., jax.Array]:
    """An initializer of the logarithm of a number drawn uniformly between `low` and `high`."""

    def init(key: jax.Array, shape: tuple[int, ...], *args: Any) -> jax.Array:
        del args
        return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))

    return init
