"""Lion against algorithm 2 of its paper."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.lm.optimizers import plain


def test_published_steps() -> None:
    def step(state: dict[str, Any], name: str, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        m = state.get("m", np.zeros_like(w))
        u = np.sign(0.9 * m + 0.1 * g)
        state["m"] = 0.99 * m + 0.01 * g
        decay = 0.3 if name != "norm" else 0.0
        return w - plain.RATE * (u + decay * w)

    plain.check({"family": "lion", "weight_decay": 0.3}, step)
