"""Power: a learning rate that needs no token budget (Shen et al. 2024, arXiv 2408.13359).

    eta_power(n) = min(peak, batch * a * n^b),   batch = tokens_per_step / 4096

The law was fitted with batches counted in sequences of 4,096 tokens, hence the unit of `batch`.
Published constants: a = 4, b = -0.51, peak = 0.02. The warmup rises to eta_power(Nw), and the decay
falls from eta_power(Ns) (_schedule.py).

It is evaluated as peak * (max(n, knee) / knee)^b, where the knee n* = (peak / (a * batch))^(1/b) is
the point where the two terms are equal. The base of the power is at least 1, so n = 0 is harmless,
and float32 stays within 1e-6 of float64 up to 1e13 tokens. A flat law (b near 0) reaches the peak
at a knee that no float can hold; the rate is then the peak for as long as anyone trains. Where
a * batch is below the peak, the knee lies before the first token; the law then starts at n = 1 with
the rate a * batch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lm.mapping import SMALLEST
from lm.schedules import Phased, Run

SEQUENCE_LEN = 4096  # tokens per sequence in the runs of the published fit
NEVER = 1e30  # more tokens than any run sees; the inverse is still a float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(Phased):
    """The options of the power law, in addition to those of `Phased`.

    Attributes:
      a: factor of the law, positive
      b: exponent of the law, negative
    """

    a: float = 4.0
    b: float = -0.51

    def problem(self) -> str | None:
        if self.a > 0 and self.b < 0:
            return super().problem()
        return f"a={self.a}, b={self.b}: Power needs a > 0 and b < 0 (published: 4, -0.51)"

    def misfit(self, *, run_tokens: int, tokens_per_step: int, is_branch: bool) -> str | None:
        _, largest = self._start(tokens_per_step)
        if largest < SMALLEST:
            return (
                f"schedule.a={self.a} with {tokens_per_step} tokens a step is a learning rate of "
                f"{largest:.2g} at most, less than float32 holds; raise a"
            )
        lengths = {"run_tokens": run_tokens, "tokens_per_step": tokens_per_step}
        return super().misfit(**lengths, is_branch=is_branch)

    def knee(self, tokens_per_step: int) -> float:
        """Tokens after which the power law is below the peak; inf where no float can hold them."""
        first = math.log(self.a) + math.log(tokens_per_step / SEQUENCE_LEN)
        exponent = (math.log(self.peak_learning_rate) - first) / self.b
        return math.exp(exponent) if exponent < math.log(sys.float_info.max) else math.inf

    def _start(self, tokens_per_step: int) -> tuple[float, float]:
        """The tokens from which the law is evaluated, and its rate there, which is its largest."""
        knee = self.knee(tokens_per_step)
        if knee >= 1:
            return min(knee, NEVER), self.peak_learning_rate
        return 1.0, self.a * (tokens_per_step / SEQUENCE_LEN)

    def stable(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        tokens, rate = map(np.float32, self._start(run.tokens_per_step))
        return Partial(_law, rate, tokens, np.float32(1.0) / tokens, np.float32(self.b))


def _law(peak: Any, start: Any, inverse: Any, exponent: Any, tokens: jax.Array) -> jax.Array:
    return peak * (jnp.maximum(tokens, start) * inverse) ** exponent
