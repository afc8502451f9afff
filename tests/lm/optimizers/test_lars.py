"""LARS against algorithm 1 of its paper. The rate is constant, so momentum before and after the
rate are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.lm.optimizers import plain


@pytest.mark.parametrize("nesterov", [False, True])
def test_published_steps(nesterov: bool) -> None:
    def step(state: dict[str, Any], name: str, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        if name == "norm":
            u = plain.RATE * g
        else:
            u = g + 0.3 * w
            u = plain.RATE * 0.02 * np.linalg.norm(w) / np.linalg.norm(u) * u
        v = state["v"] = 0.9 * state.get("v", 0.0) + u
        return w - (0.9 * v + u if nesterov else v)

    options = {"family": "lars", "weight_decay": 0.3, "trust_coefficient": 0.02}
    plain.check(options | {"nesterov": nesterov}, step)
