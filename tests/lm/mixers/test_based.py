"""BASED's linear half against its second-order weights, key by key, in float64."""

from typing import Any

import numpy as np
import pytest

from lm.modules.feature_maps import taylor, taylor_dim
from tests.lm import tiny
from tests.lm.mixers.layer import HEADS, Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import constant, double, heads, merged

TIME = 70  # a whole chunk and part of another


def plain(params: Any, x: np.ndarray) -> np.ndarray:
    """Values under the weights 1 + s + s^2 / 2 with s = q . k / d'^1/2, computed without
    features.
    """
    params = double(params)
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        s = k[b, : t + 1, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = 1 + s + s**2 / 2
        out[b, t, h] = weights @ v[b, : t + 1, h] / weights.sum()
    return merged(out, params["out"])


@pytest.mark.parametrize(
    "options", [{}, {"feature_dim": 5, "expand_v": 2.0}], ids=["defaults", "feature_dim-expand_v"]
)
def test_equals_the_weights_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("based", **options), random_input(2, TIME)
    assert relative_error(tiny.jit(layer)(layer.params, x), plain(layer.params, x)) < 1e-5


def test_the_product_of_features_is_the_second_order_exponential() -> None:
    """Heads of 16 have 153 features. Weights near 1 and far from it are right, and all are at least
    1/2.
    """
    assert taylor_dim(16) == 153
    rng = np.random.default_rng(0)
    q, k = (3 * rng.standard_normal((50, 16)).astype(np.float32) for _ in range(2))
    features = [np.asarray(tiny.jit(taylor)(x), np.float64) for x in (q, k)]
    assert features[0].shape == (50, 153)
    s = double(q) @ double(k).T / 4
    assert s.min() < -10
    assert s.max() > 10
    got = features[0] @ features[1].T
    np.testing.assert_allclose(got, 1 + s + s**2 / 2, rtol=1e-5, atol=1e-5)
    assert got.min() > 0.499


def test_the_weights_sum_to_one() -> None:
    """If every token has the same value, every output is that value."""
    layer = Layer("based")
    params, x = constant(layer.params, random_input(2, 9), "value")
    value = np.broadcast_to(params["value"]["kernel"][0], (2, 9, HEADS, 8))
    assert relative_error(tiny.jit(layer)(params, x), merged(value, params["out"])) < 1e-5


def test_sizes() -> None:
    """2 D^2 + 2 D H d', and a state of H 153 (V + 1)."""
    layer, narrow = Layer("based"), Layer("based", feature_dim=5)
    assert layer.size() == 2 * 32**2 + 2 * 32 * 4 * 16
    assert layer.state_floats(8) == layer.state_floats(64) == 4 * 153 * 9
    assert narrow.size() == 2 * 32**2 + 2 * 32 * 4 * 5
    assert narrow.state_floats() == 4 * (1 + 5 + 15) * 9


def test_every_parameter_is_a_matrix_that_decays() -> None:
    matrices = ("query", "key", "value", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    assert Layer("based").declared() == expected


def test_refusals() -> None:
    assert "feature_dim=0 must be at least 1" in refusal("based", feature_dim=0)
    assert "expand_k=0.5 has no effect here; set expand_k=1.0" in refusal("based", expand_k=0.5)
    assert "expand_v=0.3 times head_dim=8 is not a whole width" in refusal("based", expand_v=0.3)
