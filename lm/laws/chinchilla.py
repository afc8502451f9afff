"""Chinchilla: loss from parameters and tokens (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

    L(N, D) = E + A / N^alpha + B / D^beta,   C = 6 N D

Hoffmann et al. fitted it with N as all parameters. Here N counts parameters without embeddings,
which is a column of a sweep's table; for small models the two differ much. At C FLOPs the loss is
lowest at

    N_opt(C) = G (C/6)^(beta/(alpha+beta)),   G = (alpha A / (beta B))^(1/(alpha+beta))
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from lm.laws import Constant, Equation, Law, constants, sum_of_powers
from lm.mapping import POSITIVE

_DOMAIN = {"body_parameters": (70e6, 16e9), "tokens": (5e9, 500e9)}
# A fit starts from every combination of E, A, alpha, B, beta.
_STARTS = ((0.5, 1.5), (7.0, 400.0, 2e4), (0.2, 0.4, 0.7), (7.0, 400.0, 2e4), (0.2, 0.4, 0.7))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chinchilla(Law):
    E: Annotated[float, POSITIVE] = 1.69
    A: Annotated[float, POSITIVE] = 406.4
    alpha: Annotated[float, POSITIVE] = 0.34
    B: Annotated[float, POSITIVE] = 410.7
    beta: Annotated[float, POSITIVE] = 0.28

    published: ClassVar[tuple[Constant, ...]] = (
        constants(
            "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
            _DOMAIN,
            ("E", 1.69, "nat/token", "UNCONFIRMED"),
            ("A", 406.4, "nat/token * parameter^alpha", "UNCONFIRMED"),
            ("alpha", 0.34, "1", "UNCONFIRMED"),
            ("B", 410.7, "nat/token * token^beta", "UNCONFIRMED"),
            ("beta", 0.28, "1", "UNCONFIRMED"),
        )
        + constants(
            "Besiroglu et al. 2024, a refit of Hoffmann's data",
            _DOMAIN,
            ("E of the refit", 1.8172, "nat/token", "UNCONFIRMED"),
            ("A of the refit", 482.01, "nat/token * parameter^alpha", "UNCONFIRMED"),
            ("alpha of the refit", 0.3478, "1", "UNCONFIRMED"),
            ("B of the refit", 2085.43, "nat/token * token^beta", "UNCONFIRMED"),
            ("beta of the refit", 0.3658, "1", "UNCONFIRMED"),
        )
        + constants(
            "MiniCPM, arXiv 2404.06395v3, six sizes with WSD branches, loss per byte",
            {},
            ("alpha of MiniCPM", 0.29, "1", "P"),
            ("beta of MiniCPM", 0.23, "1", "P"),
            ("tokens per parameter of MiniCPM", 192.0, "token/parameter", "P"),
        )
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        sum_of_powers(
            "loss",
            "E",
            (("A", "alpha", "body_parameters"), ("B", "beta", "tokens")),
            starts=_STARTS,
        ),
    )

    def loss(self, body_parameters: Any, tokens: Any) -> Any:
        """Nats per token."""
        return self.E + self.A / body_parameters**self.alpha + self.B / tokens**self.beta

    def best_parameters(self, compute: Any) -> Any:
        """The size with the lowest loss at `compute` = 6 N D FLOPs."""
        total = self.alpha + self.beta
        factor = (self.alpha * self.A / (self.beta * self.B)) ** (1.0 / total)
        return factor * (compute / 6.0) ** (self.beta / total)

    def best_tokens(self, compute: Any) -> Any:
        """The tokens that go with `best_parameters`."""
        return compute / 6.0 / self.best_parameters(compute)


def refitted() -> Chinchilla:
    """The law with the constants of Besiroglu et al. 2024."""
    names = [field.name for field in dataclasses.fields(Chinchilla)]
    return Chinchilla(**{n: Chinchilla.constant(f"{n} of the refit").value for n in names})
