"""Adafactor against algorithms 4 and 5 of its paper."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from lm import optimizers
from lm.families import OPTIMIZERS
from tests.lm.optimizers import plain


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_published_steps(relative: bool, momentum: float) -> None:
    """As in lm, decay is outside of momentum and scale."""

    def step(state: dict[str, Any], name: str, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        t = state["t"] = state.get("t", 0) + 1
        beta = 1 - t**-0.8
        square = g * g + 1e-30
        if name == "norm":
            v = state["v"] = beta * state.get("v", 0.0) + (1 - beta) * square
        else:
            r = state["r"] = beta * state.get("r", 0.0) + (1 - beta) * square.mean(axis=1)
            c = state["c"] = beta * state.get("c", 0.0) + (1 - beta) * square.mean(axis=0)
            v = np.outer(r, c) / r.mean()
        u = g / np.sqrt(v)
        u = u / max(1.0, rms(u))
        if relative:
            u = u * max(1e-3, rms(w))
        if momentum:
            u = state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * u
        decay = 0.3 if name != "norm" else 0.0
        return w - plain.RATE * (u + decay * w)

    options = {"family": "adafactor", "weight_decay": 0.3, "relative": relative}
    plain.check(options | {"momentum": momentum}, step)


def test_its_state_is_a_row_and_a_column_of_each_layer() -> None:
    config = OPTIMIZERS.create({"family": "adafactor"}, "optimizer")
    state = jax.eval_shape(optimizers.create(config, plain.ONES, plain.INFOS).init, plain.draw(0))
    sizes = sorted(x.shape for x in jax.tree.leaves(state.inner) if max(x.shape, default=0) > 2)
    # A row and a column for each of two layers [5, 6] and for the table [7, 5]; for the norms,
    # every element.
    assert sizes == sorted([(2, 5), (2, 6), (1, 7), (1, 5), (2, 5, 1)])
