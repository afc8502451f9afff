"""Annealing: the loss of every step, from the learning rates up to it (Tissue et al. 2024, arXiv
2408.11029).

    L(s) = L0 + A S1(s)^-alpha - C S2(s)
    S1(s) = sum_{i<=s} eta_i
    m_i = lambda m_{i-1} + (eta_{i-1} - eta_i),  m_0 = 0,   S2(s) = sum_{i<=s} m_i

The warmup counts as if its rates were the peak, as in the authors' code. `decay` is lambda. One
curve does not identify it, so it is held fixed and stated. The law overestimates long slow
annealing and fails at steps down to a very small rate; `multi_power` does not.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np
from scipy.signal import lfilter

from lm.laws import LOSS_DELTA, Columns, Constant, Equation, Law, constants
from lm.mapping import BELOW_ONE, NOT_NEGATIVE, POSITIVE

_SOURCE = "Tissue et al. 2024, arXiv 2408.11029, refit of the authors' listing of 40 points"
_DOMAIN = {"steps": (500.0, 20_000.0), "learning_rate": (0.0, 2e-4)}


def _evaluate(theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """`evaluate` for theta = (log L0, log A, log alpha, log C)."""
    s1, s2 = np.log(columns["summed_rate"]), columns["annealed_rate"]
    alpha = np.exp(theta[:, 2, None])
    floor = np.broadcast_to(np.exp(theta[:, :1]), (len(theta), len(s1)))
    falling = np.exp(theta[:, 1, None] - alpha * s1)
    annealed = np.exp(theta[:, 3, None]) * s2
    total = floor + falling - annealed
    slopes = np.stack([floor, falling, -alpha * s1 * falling, -annealed], 1)
    # Where the total is not positive it has no logarithm; the fit then rejects such constants.
    total = np.where(total > 0, total, np.nan)
    return np.log(total), slopes / total[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annealing(Law):
    L0: Annotated[float, NOT_NEGATIVE] = 2.628
    A: Annotated[float, NOT_NEGATIVE] = 0.430
    alpha: Annotated[float, NOT_NEGATIVE] = 0.550
    C: Annotated[float, NOT_NEGATIVE] = 0.411
    decay: Annotated[float, BELOW_ONE, POSITIVE] = 0.999

    published: ClassVar[tuple[Constant, ...]] = constants(
        _SOURCE,
        _DOMAIN,
        ("L0", 2.628, "nat/token", "R"),
        ("A", 0.430, "nat/token * rate^alpha", "R"),
        ("alpha", 0.550, "1", "R"),
        ("C", 0.411, "nat/token / rate", "R"),
        ("decay", 0.999, "1/step", "C", 0.99, 0.999),
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        Equation(
            target="loss",
            reads=("summed_rate", "annealed_rate"),
            names=("L0", "A", "alpha", "C"),
            is_log=(True, True, True, True),
            # The authors' grid; an exponent of 0 has no logarithm.
            starts=((0.1, 2.1), (1.0, 11.5, 22.0), (0.05, 0.4, 0.8), (0.1, 1.0, 11.5, 22.0)),
            evaluate=_evaluate,
            pairs=((2, 1),),
            delta=LOSS_DELTA,
            selection="rows",
        ),
    )

    def loss(self, summed_rate: Any, annealed_rate: Any) -> Any:
        """Nats per token at S1 and S2; infinite at S1 = 0."""
        with np.errstate(divide="ignore"):
            return self.L0 + self.A * summed_rate**-self.alpha - self.C * annealed_rate

    def curve(self, rates: Any) -> np.ndarray:
        """The loss after every step, nats per token [steps], from the rate of every step [steps].
        It is infinite until the first rate above 0.
        """
        return self.loss(*sums(rates, self.decay))


def sums(rates: Any, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """S1 and S2 after every step [steps], from the rate of every step [steps] with warmup."""
    rates = flat_start(rates)
    falls = -np.diff(rates, prepend=rates[:1])
    momentum = lfilter([1.0], [1.0, -decay], falls)
    return np.cumsum(rates), np.cumsum(momentum)


def flat_start(rates: Any) -> np.ndarray:
    """The rates, where those before the first maximum are raised to it."""
    rates = np.asarray(rates, dtype=np.float64)
    peak = int(np.argmax(rates))
    return np.concatenate([np.full(peak, rates[peak]), rates[peak:]])
