"""Linear attention against its weights, key by key, in float64."""

from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import HEADS, Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import constant, double, heads, merged, rms_normed

TIME = 70  # a whole chunk and part of another
MAPS: dict[str, Any] = {
    "elu": lambda x: np.where(x > 0, 1 + x, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


def plain(layer: Layer, x: np.ndarray) -> np.ndarray:
    """Equation 8: values under the weights phi(q) . phi(k) of the keys so far."""
    params, module = double(layer.params), layer.mixer
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    q, k = (MAPS[module.feature_map](a) for a in (q, k))
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        weights = k[b, : t + 1, h] @ q[b, t, h]
        total = weights.sum() + 1e-6 if module.normalize else np.sqrt(q.shape[-1])
        out[b, t, h] = weights @ v[b, : t + 1, h] / total
    if not module.normalize:
        out = rms_normed(out, params["norm"]["scale"])
    return merged(out, params["out"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "relu", "expand_k": 2.0},
        {"feature_map": "identity", "normalize": False, "expand_v": 0.5},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_weights_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("linear", **options), random_input(2, TIME)
    assert relative_error(tiny.jit(layer)(layer.params, x), plain(layer, x)) < 1e-5


def test_the_weights_sum_to_one() -> None:
    """If every token has the same value, every output is that value."""
    layer = Layer("linear")
    params, x = constant(layer.params, random_input(2, 9), "value")
    value = np.broadcast_to(params["value"]["kernel"][0], (2, 9, HEADS, 8))
    out = tiny.jit(layer)(params, x)
    assert relative_error(out, merged(value, params["out"])) < 1e-5


def test_sizes() -> None:
    """4 D^2 and a state of H K (V + 1). With a norm in place of the sum, V more and H K V."""
    layer, normed = Layer("linear"), Layer("linear", normalize=False)
    assert layer.size() == 4 * 32**2
    assert normed.size() == 4 * 32**2 + 8
    assert layer.state_floats(8) == layer.state_floats(64) == 4 * 8 * 9
    assert normed.state_floats(8) == normed.state_floats(64) == 4 * 8 * 8
    wide = Layer("linear", expand_k=2.0, expand_v=0.5)
    assert wide.size() == 2 * 32 * (64 + 16)
    assert wide.state_floats() == 4 * 16 * (4 + 1)


def test_matrices_decay_and_the_scale_of_the_norm_does_not() -> None:
    matrix, vector = ("hidden", True), ("vector", False)
    assert Layer("linear", normalize=False).declared() == {
        "key/kernel": matrix,
        "norm/scale": vector,
        "out/kernel": matrix,
        "query/kernel": matrix,
        "value/kernel": matrix,
    }
    assert "norm/scale" not in Layer("linear").declared()


def test_refusals() -> None:
    assert "set normalize=False" in refusal("linear", feature_map="identity")
    assert "expand_k=0.3 times head_dim=8 is not a whole width" in refusal("linear", expand_k=0.3)
    assert "expand_v=0.0 times head_dim=8 is not a whole width" in refusal("linear", expand_v=0.0)
    assert "feature_map" in refusal("linear", feature_map="exp")
