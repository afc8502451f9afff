"""Gated linear attention against the paper's recurrence, token by token, in float64."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged, rms_normed, sigmoid, swish

TIME = 70  # a whole chunk and part of another


def gates(params: Any, x: np.ndarray, divisor: float) -> np.ndarray:
    """alpha [B, T, H, K] = sigmoid(x W_1 W_2 + b)^(1 / divisor)."""
    low = x @ params["decay"]["down"]["kernel"]
    return sigmoid(heads(low, params["decay"]["up"]) + params["decay"]["bias"]) ** (1 / divisor)


def plain(params: Any, x: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Equation 3: S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t; section 4.4."""
    params = double(params)
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    rows, time, num_heads, key_dim = q.shape
    out = np.zeros(v.shape)
    for b, h in np.ndindex(rows, num_heads):
        state = np.zeros((key_dim, v.shape[-1]))
        for t in range(time):
            state = np.diag(alpha[b, t, h]) @ state + np.outer(k[b, t, h], v[b, t, h])
            out[b, t, h] = q[b, t, h] @ state / key_dim  # muP: 1 / K
    out = rms_normed(out, params["norm"]["scale"]) * swish(heads(x, params["gate"]))
    return merged(out, params["out"])


@pytest.mark.parametrize(
    "options",
    [{}, {"gate_divisor": 2.0, "gate_rank": 3, "expand_k": 1.0, "expand_v": 0.5}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_recurrence_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("gla", **options), random_input(2, TIME)
    alpha = gates(double(layer.params), x, options.get("gate_divisor", 16.0))
    want = plain(layer.params, x, alpha)
    assert relative_error(tiny.jit(layer)(layer.params, x), want) < 1e-5


def test_saturated_gates_keep_all_or_nothing() -> None:
    """Open gates do not decay. Shut gates leave only the token itself: o_t = (q_t . k_t) v_t."""
    layer, x = Layer("gla"), random_input(2, TIME)
    run, shape = tiny.jit(layer), (2, TIME, 4, 4)
    for bias, alpha in ((100.0, np.ones(shape)), (-1e4, np.zeros(shape))):
        gate = layer.params["decay"] | {"bias": np.full((4, 4), bias, np.float32)}
        params = layer.params | {"decay": gate}
        assert relative_error(run(params, x), plain(params, x, alpha)) < 1e-5


def test_the_divisor_slows_the_decay() -> None:
    """With a gate's logit of zero, a token keeps 2^(-1/16) of the state in each channel."""
    layer = Layer("gla")
    params = layer.params | {"decay": jax.tree.map(np.zeros_like, layer.params["decay"])}
    log_decay = tiny.jit(layer.handed)(params, random_input(1, 2))["main"]["log_decay"]
    assert log_decay.shape == (1, 2, 4, 4)
    np.testing.assert_allclose(log_decay, -np.log(2) / 16, rtol=1e-6)


def test_sizes() -> None:
    """4 D^2 + 16 (D + D/2) + D/2 + V, and a state of D^2 / 2 H."""
    layer = Layer("gla")
    assert layer.size() == 4 * 32**2 + 16 * (32 + 16) + 16 + 8
    assert layer.state_floats(8) == layer.state_floats(64) == 32**2 // (2 * 4)
    assert Layer("gla", gate_rank=3).size() == 4 * 32**2 + 3 * (32 + 16) + 16 + 8


def test_matrices_decay_and_vectors_do_not() -> None:
    matrices = ("query", "key", "value", "gate", "out", "decay/down")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    expected["decay/up/kernel"] = ("input", True)  # it sums over a rank that does not grow
    vectors = dict.fromkeys(("norm/scale", "decay/bias"), ("vector", False))
    assert Layer("gla").declared() == expected | vectors


def test_refusals() -> None:
    assert "gate_rank=0, gate_divisor=16.0 must be positive" in refusal("gla", gate_rank=0)
    assert "gate_rank=16, gate_divisor=0.0 must be" in refusal("gla", gate_divisor=0.0)
    assert "expand_k=0.5 times head_dim=9 is not a whole width" in refusal("gla", head_dim=9)
    assert "expand_v=0.3 times head_dim=8 is not a whole width" in refusal("gla", expand_v=0.3)
