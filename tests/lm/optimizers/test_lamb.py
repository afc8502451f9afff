"""LAMB against algorithm 2 of its paper, and the norm of its step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.families import OPTIMIZERS
from tests.lm.optimizers import plain


def test_published_steps() -> None:
    def step(state: dict[str, Any], name: str, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        u = plain.adam(state, g, 0.9, 0.999, 1e-6)
        if name == "norm":
            return w - plain.RATE * u
        u = u + 0.3 * w
        return w - plain.RATE * np.linalg.norm(w) / np.linalg.norm(u) * u

    plain.check({"family": "lamb", "weight_decay": 0.3}, step)


def test_a_step_is_as_long_as_the_rate_times_the_matrix() -> None:
    before = plain.layers(plain.draw(0))
    after = plain.layers(plain.ours({"family": "lamb"}, [plain.draw(1)]))
    for (name, _, w), (_, _, moved) in zip(before, after, strict=True):
        if name != "norm":
            length = np.linalg.norm(moved - w) / np.linalg.norm(w)
            assert length == pytest.approx(plain.RATE, rel=1e-4)


@pytest.mark.parametrize("mode", ["independent", "width_invariant"])
def test_its_decay_is_coupled(mode: str) -> None:
    with pytest.raises(UserError, match=r"set optimizer\.weight_decay_mode='coupled'"):
        OPTIMIZERS.create({"family": "lamb", "weight_decay_mode": mode}, "config.optimizer")
