"""Multi-power: the loss of every step from the learning rates up to it, where the gain from each
fall of the rate grows with the steps after it (Luo et al. 2025, arXiv 2503.12811).

    L(s) = L0 + A S1(s)^-alpha - B sum_{k<=s} (eta_{k-1} - eta_k) G(eta_k^-gamma S_k(s))
    G(x) = 1 - (1 + C x)^-beta,   S1(s) = sum_{i<=s} eta_i,   S_k(s) = sum_{k<=i<=s} eta_i

The warmup is included: S1 counts its rates, and its rises take part in the sum as negative falls.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from lm.laws import Constant, Law, constants
from lm.mapping import NOT_NEGATIVE, POSITIVE

_SOURCE = "Luo et al. 2025, arXiv 2503.12811, and the README of its repository"
_DOMAIN = {"steps": (2160.0, 72_000.0), "learning_rate": (0.0, 3e-4)}
# L0, A, alpha, B, C, beta, gamma, by millions of parameters.
SHIPPED = {
    25: (3.040, 0.525, 0.508, 363.788, 2.066, 0.583, 0.641),
    100: (2.651, 0.601, 0.453, 437.946, 2.132, 0.598, 0.655),
    400: (2.375, 0.654, 0.429, 523.425, 2.025, 0.594, 0.635),
}
_NAMES = ("L0", "A", "alpha", "B", "C", "beta", "gamma")
_UNITS = (
    "nat/token",
    "nat/token * rate^alpha",
    "1",
    "nat/token / rate",
    "rate^(gamma-1)",
    "1",
    "1",
)


def _constants(millions: int, suffix: str) -> tuple[Constant, ...]:
    rows = zip(_NAMES, SHIPPED[millions], _UNITS, strict=True)
    domain = _DOMAIN | {"parameters": (millions * 1e6, millions * 1e6)}
    named = ((f"{name}{suffix}", value, unit, "C") for name, value, unit in rows)
    return constants(_SOURCE, domain, *named)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiPower(Law):
    """The defaults are the constants of the model of 100M parameters."""

    L0: Annotated[float, NOT_NEGATIVE] = 2.651
    A: Annotated[float, NOT_NEGATIVE] = 0.601
    alpha: Annotated[float, NOT_NEGATIVE] = 0.453
    B: Annotated[float, NOT_NEGATIVE] = 437.946
    C: Annotated[float, POSITIVE] = 2.132
    beta: Annotated[float, POSITIVE] = 0.598
    gamma: Annotated[float, POSITIVE] = 0.655

    published: ClassVar[tuple[Constant, ...]] = (
        *_constants(100, ""),
        *_constants(25, " of 25M"),
        *_constants(400, " of 400M"),
    )

    def curve(self, rates: Any, steps: Any = None) -> np.ndarray:
        """The loss, nats per token, after each of `steps` (counted from 1; None: every step), from
        the rate of every step [steps]. Takes time in proportion to `steps` times rate changes.
        """
        rates = np.asarray(rates, dtype=np.float64)
        asked = np.arange(1, len(rates) + 1) if steps is None else np.asarray(steps)
        summed = np.cumsum(rates)
        falls = -np.diff(rates, prepend=rates[:1])
        (changes,) = np.nonzero(falls)
        before = summed[changes] - rates[changes]
        with np.errstate(divide="ignore", over="ignore"):
            scale = self.C * rates[changes] ** -self.gamma
            steady = self.L0 + self.A * summed[asked - 1] ** -self.alpha
        found = np.empty(len(asked))
        for i, step in enumerate(asked):
            n = np.searchsorted(changes, step - 1, side="right")
            since = summed[step - 1] - before[:n]
            # A rate of 0 has an infinite scale: its fall counts fully once a step has followed.
            with np.errstate(invalid="ignore"):
                made = np.where(since > 0, scale[:n] * since, 0.0)
            gained = 1.0 - (1.0 + made) ** -self.beta
            found[i] = steady[i] - self.B * np.sum(falls[changes[:n]] * gained)
        return found


def shipped(millions: int) -> MultiPower:
    """The law with the constants of the model of 25, 100 or 400 million parameters."""
    return MultiPower(**dict(zip(_NAMES, SHIPPED[millions], strict=True)))
