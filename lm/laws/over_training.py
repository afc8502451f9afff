"""Over-training: loss from compute and tokens per parameter (Gadre et al. 2024, arXiv 2403.08540).

    L(C, M) = E + (a M^eta + b M^-eta) C^-eta,   M = D / N,  C = 6 N D
    Err(L)  = epsilon - k exp(-gamma L)

The first law is Chinchilla's with equal exponents: eta = alpha / 2, a = A 6^eta, b = B 6^eta.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from lm.laws import LOSS_DELTA, Columns, Constant, Equation, Law, constants
from lm.mapping import POSITIVE

_SOURCE = "Gadre et al. 2024, arXiv 2403.08540v2, models trained on C4"
_DOMAIN = {"body_parameters": (11e6, 411e6), "tokens_per_parameter": (5.0, 640.0)}


def _evaluate(theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """`evaluate` for theta = (log E, log a, log b, eta)."""
    ratio, compute = np.log(columns["tokens_per_parameter"]), np.log(columns["compute"])
    eta = theta[:, 3, None]
    floor = np.broadcast_to(np.exp(theta[:, :1]), (len(theta), len(ratio)))
    rising = np.exp(theta[:, 1, None] + eta * (ratio - compute))
    falling = np.exp(theta[:, 2, None] - eta * (ratio + compute))
    by_eta = (ratio - compute) * rising - (ratio + compute) * falling
    total = floor + rising + falling
    return np.log(total), np.stack([floor, rising, falling, by_eta], 1) / total[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverTraining(Law):
    E: Annotated[float, POSITIVE] = 1.51
    a: Annotated[float, POSITIVE] = 141.0
    b: Annotated[float, POSITIVE] = 190.0
    eta: Annotated[float, POSITIVE] = 0.121
    epsilon: float = 0.850
    k: float = 2.08
    gamma: Annotated[float, POSITIVE] = 0.756

    published: ClassVar[tuple[Constant, ...]] = constants(
        _SOURCE,
        _DOMAIN,
        ("E", 1.51, "nat/token", "UNCONFIRMED"),
        ("a", 141.0, "nat/token * FLOP^eta", "UNCONFIRMED"),
        ("b", 190.0, "nat/token * FLOP^eta", "UNCONFIRMED"),
        ("eta", 0.121, "1", "UNCONFIRMED"),
        ("epsilon", 0.850, "top-1 error", "UNCONFIRMED"),
        ("k", 2.08, "top-1 error", "UNCONFIRMED"),
        ("gamma", 0.756, "token/nat", "UNCONFIRMED"),
        ("error of predicted losses", 0.007, "1", "S"),
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        Equation(
            target="loss",
            reads=("compute", "tokens_per_parameter"),
            names=("E", "a", "b", "eta"),
            is_log=(True, True, True, False),
            starts=((0.5, 1.5), (7.0, 100.0, 2e3), (7.0, 100.0, 2e3), (0.07, 0.15, 0.3)),
            evaluate=_evaluate,
            pairs=((3, 1),),
            delta=LOSS_DELTA,
            selection="best",
        ),
    )

    def loss(self, compute: Any, tokens_per_parameter: Any) -> Any:
        """Nats per token of a run of `compute` FLOPs at this ratio of tokens to parameters."""
        power = np.asarray(tokens_per_parameter) ** self.eta
        return self.E + (self.a * power + self.b / power) * compute**-self.eta

    def error(self, loss: Any) -> Any:
        """Mean top-1 error on downstream tasks at a validation loss."""
        return self.epsilon - self.k * np.exp(-self.gamma * np.asarray(loss))


def of_chinchilla(E: float, A: float, B: float, alpha: float) -> OverTraining:
    """The law that equals E + A / N^alpha + B / D^alpha."""
    eta = alpha / 2.0
    return OverTraining(E=E, a=A * 6.0**eta, b=B * 6.0**eta, eta=eta)
