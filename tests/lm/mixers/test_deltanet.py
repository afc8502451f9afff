"""DeltaNet against the paper's recurrence, token by token, in float64."""

from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged, rms_normed, sigmoid, swish
from tests.lm.mixers.plain_recurrent import convolved, delta_rule, noise, unit

TIME = 70  # whole chunks and part of another


def lively(layer: Layer) -> Any:
    """Convolutions of either sign; with parameters near one they would only average."""
    if not layer.mixer.conv_size:
        return layer.params
    weight = noise(layer.params["conv"]["weight"].shape, -1, 1)
    return layer.params | {"conv": {"weight": weight}}


def plain(layer: Layer, params: Any, x: np.ndarray) -> np.ndarray:
    """Projections, convolutions, SiLU, unit keys and queries, the delta rule, a norm per head."""
    params, module = double(params), layer.mixer
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    if module.conv_size:
        widths = np.cumsum([q.shape[-1], k.shape[-1]])
        weights = np.split(params["conv"]["weight"], widths, axis=1)
        q, k, v = (convolved(a, w) for a, w in zip((q, k, v), weights, strict=True))
    q, k, v = unit(swish(q)), unit(swish(k)), swish(v)
    beta = sigmoid(x @ params["beta"]["kernel"]) * (2 if module.negative_eigenvalues else 1)
    out = delta_rule(q, k, v, beta, np.ones_like(beta))
    return merged(rms_normed(out, params["norm"]["scale"]), params["out"])


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_size": 0, "negative_eigenvalues": True}, {"conv_size": 3, "expand_v": 2.0}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_recurrence_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("deltanet", **options), random_input(2, TIME)
    params = lively(layer)
    assert relative_error(tiny.jit(layer)(params, x), plain(layer, params, x)) < 1e-5


@pytest.mark.parametrize("doubled", [False, True])
def test_a_key_written_again_without_value_is_erased_or_negated(doubled: bool) -> None:
    """At beta = 1 writing a key again with value 0 erases it. At beta = 2 each such write changes
    its sign: the eigenvalue is 1 - beta = -1, so the sign is the parity of the tokens since.
    """
    layer = Layer("deltanet", conv_size=0, negative_eigenvalues=doubled)
    x = np.zeros((1, 7, 32), np.float32)
    x[..., 0], x[:, 0, 1] = 1.0, 1.0  # keys, queries and beta read column 0, values column 1
    params = {name: dict(leaves) for name, leaves in layer.params.items()}
    for name, column in {"query": 0, "key": 0, "beta": 0, "value": 1}.items():
        kernel = np.zeros_like(params[name]["kernel"])
        kernel[column] = 100.0 if name == "beta" else params[name]["kernel"][column]
        params[name]["kernel"] = kernel
    out = np.asarray(tiny.jit(layer)(params, x))[0]
    assert np.abs(out[0]).max() > 0.1
    signs = (-1.0) ** np.arange(7) if doubled else np.eye(7)[0]
    np.testing.assert_allclose(out, signs[:, None] * out[0], atol=2e-3)


def test_without_convolution_only_the_state_carries_tokens() -> None:
    bare = Layer("deltanet", conv_size=0)
    assert set(bare.mixer.calls()) == {"main"}
    assert "conv/weight" not in bare.declared()


def test_sizes() -> None:
    """4 D^2 + D H + 4 * 3 D + V; state D K and the last 4 of 3 D inputs of convolutions."""
    layer, bare = Layer("deltanet"), Layer("deltanet", conv_size=0)
    assert layer.size() == 4 * 32**2 + 32 * 4 + 4 * 3 * 32 + 8
    assert layer.state_floats(8) == layer.state_floats(64) == 32 * 8 + 4 * 3 * 32
    assert bare.size() == layer.size() - 4 * 3 * 32
    assert bare.state_floats(8) == bare.state_floats(64) == 32 * 8
    wide = Layer("deltanet", expand_k=0.5, expand_v=2.0)
    assert wide.size() == 2 * 32 * (16 + 64) + 32 * 4 + 4 * (2 * 16 + 64) + 16
    assert wide.state_floats() == 4 * 4 * 16 + 4 * (2 * 16 + 64)


def test_matrices_decay_and_so_do_convolutions_but_not_the_scale_of_the_norm() -> None:
    matrices = ("query", "key", "value", "beta", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    vectors = {"conv/weight": ("vector", True), "norm/scale": ("vector", False)}
    assert Layer("deltanet").declared() == expected | vectors


def test_refusals() -> None:
    assert "conv_size=-1 is negative" in refusal("deltanet", conv_size=-1)
    assert "expand_k=0.3 times head_dim=8 is not a whole width" in refusal("deltanet", expand_k=0.3)
    assert "negative_eigenvalues" in refusal("deltanet", negative_eigenvalues="yes")
    assert "conv_size" in refusal("deltanet", conv_size=2.5)
