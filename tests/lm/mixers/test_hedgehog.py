"""Hedgehog against its weights, key by key, in float64; both published feature maps."""

from typing import Any

import numpy as np
import pytest

from lm.modules.feature_maps import Hedgehog as FeatureMap
from tests.lm import tiny
from tests.lm.mixers.layer import HEADS, Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import constant, double, heads, merged, softmax

TIME = 70  # a whole chunk and part of another


def features(x: np.ndarray, params: Any, kind: str) -> np.ndarray:
    """[B, T, H, K] -> [B, T, H, 2 K]: one softmax over both signs together, or one over each."""
    if kind == "joint":
        y = x @ params["kernel"] + params["bias"]
        return softmax(np.concatenate([2 * y, -2 * y], axis=-1))
    y = np.stack([x[..., h, :] @ params["kernel"][h] for h in range(HEADS)], axis=-2)
    return np.concatenate([softmax(y), softmax(-y)], axis=-1)


def plain(params: Any, x: np.ndarray, kind: str) -> np.ndarray:
    params = double(params)
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    q, k = features(q, params["query_map"], kind), features(k, params["key_map"], kind)
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        weights = k[b, : t + 1, h] @ q[b, t, h]
        out[b, t, h] = weights @ v[b, : t + 1, h] / weights.sum()
    return merged(out, params["out"])


@pytest.mark.parametrize(
    "options",
    [{}, {"feature_map": "joint"}, {"expand_k": 0.5, "expand_v": 2.0}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_weights_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("hedgehog", **options), random_input(2, TIME)
    want = plain(layer.params, x, options.get("feature_map", "split"))
    assert relative_error(tiny.jit(layer)(layer.params, x), want) < 1e-5


@pytest.mark.parametrize(("kind", "total"), [("joint", 1.0), ("split", 2.0)])
def test_features_are_positive_and_sum_to(kind: Any, total: float) -> None:
    """Even for heads far from zero. At the start the map is the identity."""
    layer = Layer("hedgehog", feature_map=kind)
    handed = tiny.jit(layer.handed)(layer.params, 30 * random_input(2, 5))["main"]
    for name in ("q", "k"):
        phi = np.asarray(handed[name])
        assert phi.shape == (2, 5, HEADS, 16)
        assert phi.min() >= 0
        np.testing.assert_allclose(phi.sum(axis=-1), total, rtol=1e-6)
    module = FeatureMap(layer.mixer.context, HEADS, kind)
    x = random_input(2, 5).reshape(2, 5, HEADS, 8)
    phi, boxed = tiny.jit(module.init_with_output)({"params": np.zeros(2, np.uint32)}, x)
    size = {"joint": 2.0, "split": 1.0}[kind]
    both = [softmax(size * x), softmax(-size * x)]
    if kind == "joint":
        both = [softmax(np.concatenate([2 * x, -2 * x], axis=-1))]
    np.testing.assert_allclose(phi, np.concatenate(both, axis=-1), rtol=1e-5)
    kernel = boxed["params"]["kernel"].value
    np.testing.assert_array_equal(kernel, np.broadcast_to(np.eye(8), kernel.shape))


@pytest.mark.parametrize("kind", ["joint", "split"])
def test_the_weights_sum_to_one(kind: str) -> None:
    """If every token has the same value, every output is that value."""
    layer = Layer("hedgehog", feature_map=kind)
    params, x = constant(layer.params, random_input(2, 9), "value")
    value = np.broadcast_to(params["value"]["kernel"][0], (2, 9, HEADS, 8))
    assert relative_error(tiny.jit(layer)(params, x), merged(value, params["out"])) < 1e-5


def test_sizes() -> None:
    """4 D^2 and 2 H K^2, or 2 (K^2 + K) if the heads share maps; a state of H 2K (V + 1)."""
    split, joint = Layer("hedgehog"), Layer("hedgehog", feature_map="joint")
    assert split.size() == 4 * 32**2 + 2 * 4 * 8**2
    assert joint.size() == 4 * 32**2 + 2 * (8**2 + 8)
    for layer in (split, joint):
        assert layer.state_floats(8) == layer.state_floats(64) == 4 * 16 * 9


def test_matrices_of_the_layer_decay_and_the_feature_maps_do_not() -> None:
    """Decay would pull the maps from the identity towards zero."""
    matrices = ("query", "key", "value", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    maps = [f"{name}_map/{leaf}" for name in ("query", "key") for leaf in ("kernel", "bias")]
    declared = Layer("hedgehog", feature_map="joint").declared()
    assert declared == expected | dict.fromkeys(maps, ("vector", False))


def test_refusals() -> None:
    assert "model.layers.layer.feature_map" in refusal("hedgehog", feature_map="both")
    assert "expand_k=0.3 times head_dim=8 is not a whole width" in refusal("hedgehog", expand_k=0.3)
    assert "expand_v=0.3 times head_dim=8 is not a whole width" in refusal("hedgehog", expand_v=0.3)
