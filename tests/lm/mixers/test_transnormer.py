"""TransNormer's NormAttention against sums over keys in float64."""

from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged, rms_normed

TIME = 70  # a whole chunk and part of another
MAPS: dict[str, Any] = {
    "elu": lambda x: np.where(x > 0, 1 + x, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


def plain(layer: Layer, x: np.ndarray) -> np.ndarray:
    """Equation 8, for each token with the keys so far. The shape of the scale says what the norm is
    over.
    """
    params, phi = double(layer.params), MAPS[layer.mixer.feature_map]
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        summed = phi(k[b, : t + 1, h]).T @ v[b, : t + 1, h]
        out[b, t, h] = phi(q[b, t, h]) @ summed / np.sqrt(q.shape[-1])
    return merged(rms_normed(out, params["norm"]["scale"]), params["out"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "relu", "norm_over": "head"},
        {"feature_map": "identity", "expand_k": 0.5, "expand_v": 2.0},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_sums_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("transnormer", **options), random_input(2, TIME)
    assert relative_error(tiny.jit(layer)(layer.params, x), plain(layer, x)) < 1e-5


@pytest.mark.parametrize("norm_over", ["head", "heads"])
def test_the_size_of_the_keys_does_not_matter(norm_over: str) -> None:
    """o(c k) = o(k) for c > 0, if the feature map only scales. The same holds for values."""
    changes = {"model.norm_eps": 1e-24}  # eps is the only thing that depends on size
    layer = Layer("transnormer", changes, feature_map="relu", norm_over=norm_over)
    run, x = tiny.jit(layer), random_input(2, 9)
    want = run(layer.params, x)
    for name in ("key", "value"):
        for c in (1e-2, 300.0):
            scaled = {name: {"kernel": np.float32(c) * layer.params[name]["kernel"]}}
            assert relative_error(run(layer.params | scaled, x), want) < 1e-5


def test_the_norm_is_over_the_token_or_over_each_head() -> None:
    """What is normed has a root mean square of one."""
    x = random_input(2, 9)
    for norm_over, axes in (("head", (3,)), ("heads", (2, 3))):
        layer = Layer("transnormer", norm_over=norm_over)
        identity = np.eye(32, dtype=np.float32).reshape(4, 8, 32)
        scale = np.ones_like(layer.params["norm"]["scale"])
        params = layer.params | {"norm": {"scale": scale}, "out": {"kernel": identity}}
        out = np.asarray(tiny.jit(layer)(params, x)).reshape(2, 9, 4, 8)
        np.testing.assert_allclose(np.mean(out**2, axis=axes), 1.0, rtol=1e-3)


def test_sizes() -> None:
    """4 D^2 + D, or 4 D^2 + V with a norm of each head; a state of H K V."""
    layer = Layer("transnormer")
    assert layer.size() == 4 * 32**2 + 32
    assert Layer("transnormer", norm_over="head").size() == 4 * 32**2 + 8
    assert layer.state_floats(8) == layer.state_floats(64) == 4 * 8 * 8


def test_matrices_decay_and_the_scale_of_the_norm_does_not() -> None:
    matrices = ("query", "key", "value", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    assert Layer("transnormer").declared() == expected | {"norm/scale": ("vector", False)}


def test_refusals() -> None:
    assert "model.layers.layer.feature_map" in refusal("transnormer", feature_map="swish")
    assert "model.layers.layer.norm_over" in refusal("transnormer", norm_over="token")
    assert "expand_k=0.3 times head_dim=8 is not a whole" in refusal("transnormer", expand_k=0.3)
    assert "expand_v=0.3 times head_dim=8 is not a whole" in refusal("transnormer", expand_v=0.3)
