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

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lm.schedules import Phased, Run

SEQUENCE_LEN = 4096  # of the runs the published constants were fitted to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(Phased):
    """`a`, `b`: the law's factor and exponent."""

    a: float = 4.0
    b: float = -0.51

    def problem(self) -> str | None:
        if self.a > 0 and self.b < 0:
            return None
        return f"a={self.a}, b={self.b}: Power needs a > 0 and b < 0 (published: 4, -0.51)"

    def knee(self, tokens_per_step: int) -> float:
        """Tokens at which the power law falls below the peak."""
        batch = tokens_per_step / SEQUENCE_LEN
        return (self.peak_learning_rate / (self.a * batch)) ** (1.0 / self.b)

    def stable(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        start = np.float32(self.knee(run.tokens_per_step))
        peak, exponent = np.float32(self.peak_learning_rate), np.float32(self.b)
        return Partial(_law, peak, start, np.float32(1.0) / start, exponent)


def _law(peak: Any, start: Any, inverse: Any, exponent: Any, tokens: jax.Array) -> jax.Array:
    return peak * (jnp.maximum(tokens, start) * inverse) ** exponent
