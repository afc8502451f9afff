"""Average parameters: Chinchilla's law for a model that is pruned while it trains (The Journey
Matters, arXiv 2501.12486).

    L = E + A / N_avg^alpha + B / D^beta,   N_avg = (1/D) integral of N over the tokens

N counts the linear parameters that can be pruned. A dense model is the case N_avg = N.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import numpy as np

from lm.laws import Constant, Equation, Law, constants, sum_of_powers
from lm.mapping import POSITIVE, UserError

Shape = Literal["linear", "cubic"]
_POINTS = 20_001  # of the numerical integral over compute, which then has an error of 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageParameters(Law):
    """The constants of the loss are Chinchilla's (arXiv 2203.15556): the paper's form is the same,
    and we have not read its own constants.
    """

    E: Annotated[float, POSITIVE] = 1.69
    A: Annotated[float, POSITIVE] = 406.4
    alpha: Annotated[float, POSITIVE] = 0.34
    B: Annotated[float, POSITIVE] = 410.7
    beta: Annotated[float, POSITIVE] = 0.28
    start: float = 0.25
    end: float = 0.75

    published: ClassVar[tuple[Constant, ...]] = constants(
        "The Journey Matters, arXiv 2501.12486, 80 schedules of pruning",
        {"body_parameters": (58e6, 468e6)},
        ("start", 0.25, "share of the compute", "S"),
        ("end", 0.75, "share of the compute", "S"),
    ) + constants(
        "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
        {"body_parameters": (70e6, 16e9), "tokens": (5e9, 500e9)},
        ("E", 1.69, "nat/token", "UNCONFIRMED"),
        ("A", 406.4, "nat/token * parameter^alpha", "UNCONFIRMED"),
        ("alpha", 0.34, "1", "UNCONFIRMED"),
        ("B", 410.7, "nat/token * token^beta", "UNCONFIRMED"),
        ("beta", 0.28, "1", "UNCONFIRMED"),
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        sum_of_powers(
            "loss",
            "E",
            (("A", "alpha", "average_parameters"), ("B", "beta", "tokens")),
            starts=(
                (0.5, 1.5),
                (7.0, 400.0, 2e4),
                (0.2, 0.4, 0.7),
                (7.0, 400.0, 2e4),
                (0.2, 0.4, 0.7),
            ),
        ),
    )

    def problem(self) -> str | None:
        if 0.0 <= self.start < self.end <= 1.0:
            return None
        return f"start={self.start}, end={self.end}: pruning needs 0 <= start < end <= 1"

    def loss(self, average_parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / average_parameters**self.alpha + self.B / tokens**self.beta

    def kept(self, share: np.ndarray, sparsity: float, shape: Shape) -> np.ndarray:
        """The share of the parameters that is left when a given share of the run is done."""
        u = np.clip((share - self.start) / (self.end - self.start), 0.0, 1.0)
        return 1.0 - sparsity * (u if shape == "linear" else 1.0 - (1.0 - u) ** 3)

    def average(self, sparsity: float, shape: Shape = "linear") -> float:
        """N_avg / N of a run that is pruned to `sparsity` between the shares `start` and `end` of
        its *tokens*.

        Raises:
          UserError: a sparsity outside [0, 1).
        """
        _check(sparsity)
        filled = 0.5 if shape == "linear" else 0.75  # the mean of the ramp from 0 to 1
        ramp = self.end - self.start
        return 1.0 - sparsity * (filled * ramp + 1.0 - self.end)

    def average_over_compute(self, sparsity: float, shape: Shape = "linear") -> float:
        """The same where `start` and `end` are shares of the *compute*, the integral of 6 N over
        tokens. At a share c of the compute a token costs in proportion to N(c), so D is the
        integral of dc / N(c), and N_avg / N is 1 over that.

        Raises:
          UserError: a sparsity outside [0, 1).
        """
        _check(sparsity)
        c = np.linspace(0.0, 1.0, _POINTS)
        return float(1.0 / np.trapezoid(1.0 / self.kept(c, sparsity, shape), c))


def _check(sparsity: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity={sparsity} must lie in [0, 1)")
