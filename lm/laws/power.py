"""Power: the best peak rate of a run that decays to zero, from its batch and tokens (Shen et al.
2024, arXiv 2408.13359).

    eta(batch, T) = a * beta^c * T^b,   beta = batch_tokens / 4096

The paper counts the batch in sequences of 4,096 tokens and takes c = 1. On Step Law's public grid c
is near 0.3, and there is no dependence on tokens at a fixed batch. So c is free here, and a fit
reports whether c = 1 is plausible.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from lm.laws import RATE_DELTA, Columns, Constant, Equation, Law, constants, log_linear
from lm.mapping import POSITIVE

SEQUENCE_LEN = 4096  # tokens per sequence, in which the paper counts batches
_SOURCE = "Shen et al. 2024, arXiv 2408.13359v2"
# Fitted to models of 12M, 36M and 121M, widths 128 to 512, under muP, on RedPajama.
_DOMAIN = {
    "tokens": (2e9, 256e9),
    "batch_tokens": (16 * 4096.0, 512 * 4096.0),
    "body_parameters": (12e6, 121e6),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(Law):
    """`eta_max` caps the rate of the schedule; it is not part of the law."""

    a: Annotated[float, POSITIVE] = 4.0
    b: float = -0.51
    c: float = 1.0
    eta_max: Annotated[float, POSITIVE] = 0.02

    published: ClassVar[tuple[Constant, ...]] = (
        constants(
            _SOURCE,
            _DOMAIN,
            ("a", 4.0, "rate * token^-b", "P", 3.0, 5.0),
            ("b", -0.51, "1", "P", -0.53, -0.49),
            ("c", 1.0, "1", "P"),
            ("eta_max", 0.02, "rate", "P"),
            ("a of all sizes", 4.6, "rate * token^-b", "P"),
            ("b of all sizes", -0.51, "1", "P"),
            ("a of 12M", 3.81, "rate * token^-b", "P"),
            ("b of 12M", -0.503, "1", "P"),
            ("a of 36M", 5.17, "rate * token^-b", "P"),
            ("b of 36M", -0.518, "1", "P"),
            ("a of 121M", 3.76, "rate * token^-b", "P"),
            ("b of 121M", -0.502, "1", "P"),
        )
        + constants(
            "refit of Step Law's public grid (215M to 1.07B, standard parametrisation, cosine)",
            {"tokens": (2e9, 100e9), "body_parameters": (215e6, 1.07e9)},
            ("b at a fixed batch", 0.011, "1", "R", -0.05, 0.07),
            ("c at fixed tokens", 0.302, "1", "R", 0.24, 0.36),
        )
        + constants(
            "a published law of the token horizon, of which we know only the exponent",
            {},
            ("b of the token horizon", -0.4, "1", "UNCONFIRMED"),
        )
    )
    hypotheses: ClassVar[tuple[tuple[str, float], ...]] = (("c", 1.0),)
    equations: ClassVar[tuple[Equation, ...]] = (
        log_linear(
            "learning_rate",
            "a",
            {"b": ("tokens", 1.0), "c": ("batch_tokens", SEQUENCE_LEN)},
            delta=RATE_DELTA,
            selection="vertex",
        ),
    )

    def rate(self, batch_tokens: Any, tokens: Any) -> Any:
        """The best peak rate for a run of `tokens` with `batch_tokens` per step."""
        return self.a * (np.asarray(batch_tokens) / SEQUENCE_LEN) ** self.c * tokens**self.b

    def capped(self, batch_tokens: Any, tokens: Any) -> Any:
        """The rate of Power's schedule after `tokens` > 0, outside warmup and decay."""
        return np.minimum(self.eta_max, self.rate(batch_tokens, tokens))

    def knee(self, batch_tokens: float) -> float:
        """The tokens after which the law is below `eta_max`."""
        beta = (batch_tokens / SEQUENCE_LEN) ** self.c
        return float((self.eta_max / (self.a * beta)) ** (1.0 / self.b))

    def remarks(self, columns: Columns) -> tuple[str, ...]:
        if not self.b < 0:
            return (
                f"b={self.b:.3g}: the best rate does not fall with tokens, so there is no knee",
            )
        batches = np.unique(columns["batch_tokens"])
        ends = dict.fromkeys((float(batches[0]), float(batches[-1])))
        crossings = [f"{self._crossing(batch)} at a batch of {batch:g}" for batch in ends]
        return (f"the law is below eta_max={self.eta_max:g} (its knee) {', '.join(crossings)}",)

    def _crossing(self, batch_tokens: float) -> str:
        with np.errstate(over="ignore"):
            knee = self.knee(batch_tokens)
        return "from the first token" if knee < 1 else f"after {knee:.3g} tokens"

    def problem(self) -> str | None:
        return None if self.b else "b=0: a rate that does not depend on tokens has no knee"
