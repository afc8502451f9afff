"""Compute: loss from the FLOPs of a run, for a recipe that fixes how FLOPs are spent.

    L(C) = E + K / C^alpha

With E = 0 it is L(C_min) of Kaplan et al. 2020 (arXiv 2001.08361), whose constants are the
defaults: alpha = 0.050, C_c = 3.1e8 petaflop-days, K = C_c^alpha.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from lm.laws import Constant, Equation, Law, constants, sum_of_powers
from lm.mapping import NOT_NEGATIVE, POSITIVE

_KAPLAN = (3.1e8 * 1e15 * 86400.0) ** 0.050


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(Law):
    E: Annotated[float, NOT_NEGATIVE] = 0.0
    K: Annotated[float, POSITIVE] = _KAPLAN
    alpha: Annotated[float, POSITIVE] = 0.050

    published: ClassVar[tuple[Constant, ...]] = constants(
        "Kaplan et al. 2020, arXiv 2001.08361",
        {},
        ("E", 0.0, "nat/token", "UNCONFIRMED"),
        ("K", _KAPLAN, "nat/token * FLOP^alpha", "UNCONFIRMED"),
        ("alpha", 0.050, "1", "UNCONFIRMED"),
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        sum_of_powers(
            "loss",
            "E",
            (("K", "alpha", "compute"),),
            starts=((0.01, 0.3, 1.0, 1.5, 2.5), (3.0, 50.0, 1e3, 2e4), (0.05, 0.15, 0.3)),
        ),
    )

    def loss(self, compute: Any) -> Any:
        """Nats per token."""
        return self.E + self.K / compute**self.alpha
