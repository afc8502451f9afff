"""Growth timing: how long to train a small model before its blocks are stacked (Du et al. 2024,
arXiv 2405.15319, G_stack).

    log10 d = a log10 N + b / log10 C + c

d: tokens of the small model; N: parameters of the grown model without embeddings; C: FLOPs of the
whole training, 6 N D. The blocks are stacked `factor` times.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from lm.laws import Constant, Law, constants
from lm.mapping import POSITIVE

_SOURCE = "Du et al. 2024, arXiv 2405.15319"
_DOMAIN = {"body_parameters": (410e6, 7e9), "tokens": (97.5e9, 750e9)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthTiming(Law):
    a: float = 0.88
    b: float = 163.27
    c: float = -5.74
    factor: Annotated[int, POSITIVE] = 4

    published: ClassVar[tuple[Constant, ...]] = constants(
        _SOURCE,
        _DOMAIN,
        ("a", 0.88, "1", "P"),
        ("b", 163.27, "1", "P"),
        ("c", -5.74, "1", "P"),
        ("factor", 4, "1", "P", 2, 4),
        ("speed-up of 400M to 1.1B at 97.5e9 tokens", 0.491, "1", "P"),
    )

    def tokens(self, body_parameters: Any, compute: Any) -> Any:
        """Tokens to train the small model on before it is stacked."""
        logs = self.a * np.log10(body_parameters) + self.b / np.log10(compute) + self.c
        return 10.0**logs
