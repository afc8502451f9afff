"""Step Law: best peak rate and batch from parameters and tokens (Li et al. 2025, arXiv 2503.04715).

    eta(N, D) = k N^alpha D^beta,   B(D) = h D^gamma tokens

N counts parameters without embeddings. The law was fitted to runs in the standard parametrization
with a cosine that ends at a fixed rate of 1e-5.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from lm.laws import RATE_DELTA, Constant, Equation, Law, constants, log_linear
from lm.mapping import POSITIVE

_SOURCE = "Li et al. 2025, arXiv 2503.04715 (Step Law), and its repository"
_DOMAIN = {"body_parameters": (60e6, 1.07e9), "tokens": (2e9, 100e9)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLaw(Law):
    k: Annotated[float, POSITIVE] = 1.79
    alpha: float = -0.713
    beta: float = 0.307
    h: Annotated[float, POSITIVE] = 0.58
    gamma: float = 0.571

    published: ClassVar[tuple[Constant, ...]] = constants(
        _SOURCE,
        _DOMAIN,
        ("k", 1.79, "rate * parameter^-alpha * token^-beta", "C"),
        ("alpha", -0.713, "1", "C", -0.774, -0.655),
        ("beta", 0.307, "1", "C", 0.271, 0.345),
        ("h", 0.58, "token^(1-gamma)", "C"),
        ("gamma", 0.571, "1", "C", 0.534, 0.606),
    )
    equations: ClassVar[tuple[Equation, ...]] = (
        log_linear(
            "learning_rate",
            "k",
            {"alpha": ("body_parameters", 1.0), "beta": ("tokens", 1.0)},
            delta=RATE_DELTA,
            selection="near",
        ),
        log_linear(
            "batch_tokens", "h", {"gamma": ("tokens", 1.0)}, delta=RATE_DELTA, selection="near"
        ),
    )

    def rate(self, body_parameters: Any, tokens: Any) -> Any:
        """The best peak rate."""
        return self.k * body_parameters**self.alpha * tokens**self.beta

    def batch(self, tokens: Any) -> Any:
        """The best batch, in tokens per step."""
        return self.h * tokens**self.gamma
