"""Muon against its authors' code, and Adam for the parameters that are not matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lm.optimizers.muon import Muon
from lm.params import ParamInfo
from tests.lm.optimizers import plain


def orthogonal(x: np.ndarray) -> np.ndarray:
    """zeropower_via_newtonschulz5 of KellerJordan/Muon, in float64."""
    x = x / np.linalg.norm(x)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if is_tall else x


@pytest.mark.parametrize("scale", ["rms", "spectral"])
def test_published_steps(scale: str) -> None:
    def step(state: dict[str, Any], name: str, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        decay = 0.3 if name != "norm" else 0.0
        if name != "query":
            u = plain.adam(state, g, 0.9, 0.95, 1e-10)
            return w - plain.RATE * (u + decay * w)
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = 0.95 * state.get("m", 0.0) + 0.05 * g
        # optax corrects the bias of both parts; that of the momentum as if for the next step.
        u = orthogonal(0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t))
        factor = 0.2 * np.sqrt(6) if scale == "rms" else np.sqrt(6 / 5)
        return w - plain.RATE * (factor * u + decay * w)

    plain.check({"family": "muon", "weight_decay": 0.3, "scale": scale}, step)


def test_the_step_of_a_matrix_is_nearly_orthogonal() -> None:
    before = {(k, i): w for k, i, w in plain.layers(plain.draw(0))}
    options = {"family": "muon", "weight_decay": 0.0, "scale": "spectral"}
    for key, i, w in plain.layers(plain.ours(options, [plain.draw(1)])):
        if key == "query":
            step = (w - before[key, i]) / plain.RATE / np.sqrt(6 / 5)
            values = np.linalg.svd(step, compute_uv=False)
            assert values.min() > 0.5
            assert values.max() < 1.3


@pytest.mark.parametrize("scale", ["rms", "spectral"])
def test_the_largest_singular_value_of_a_step_does_not_grow(scale: Any) -> None:
    """The factor of a square matrix times muP's factor of its rate is the same at all widths."""
    muon = Muon(scale=scale)
    of = lambda n: muon._scale_of(ParamInfo("D F", (n, n), "hidden", True, 1))
    found = [of(n) * n**muon.width_exponent for n in (64, 256, 1024)]
    assert found == pytest.approx([found[0]] * 3)
