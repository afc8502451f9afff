"""Retention against the paper's recurrence, token by token, in float64."""

from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged, rms_normed, swish

TIME = 70  # a whole chunk and part of another


def turned(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """x [..., K] as K/2 complex numbers, channels c and c + K/2, each turned by its angle."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def plain(layer: Layer, x: np.ndarray, first: int = 0) -> np.ndarray:
    """Equations 6 and 8: S_n = gamma S_{n-1} + k_n^T v_n, o_n = q_n S_n, gamma = 1 - 2^(-5 - h)."""
    params, theta = double(layer.params), layer.mixer.rope_theta
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    rows, time, num_heads, key_dim = q.shape
    out = np.zeros(v.shape)
    for b, h in np.ndindex(rows, num_heads):
        state = np.zeros((key_dim, v.shape[-1]))
        for t in range(time):
            key, query = (turned(a[b, t, h], first + t, theta) for a in (k, q))
            state = (1 - 2.0 ** (-5 - h)) * state + np.outer(key, v[b, t, h])
            out[b, t, h] = query @ state / key_dim  # muP: 1 / K
    out = rms_normed(out, params["norm"]["scale"]) * swish(heads(x, params["gate"]))
    return merged(out, params["out"])


@pytest.mark.parametrize(
    "options",
    [{}, {"rope_theta": 10.0, "expand_k": 2.0, "expand_v": 0.5}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_recurrence_of_the_paper(options: dict[str, Any]) -> None:
    layer, x = Layer("retnet", **options), random_input(2, TIME)
    assert relative_error(tiny.jit(layer)(layer.params, x), plain(layer, x)) < 1e-5


def test_only_distances_matter() -> None:
    """Positions that start at 1000 give the same output, since the rotations of q and k cancel."""
    layer, x = Layer("retnet"), random_input(1, 9)
    assert relative_error(plain(layer, x, 1000), plain(layer, x)) < 1e-12
    shifted = 1000 + np.arange(9, dtype=np.int32)[None]
    got = tiny.jit(layer)(layer.params, x, np.ones((1, 9), np.int32), shifted)
    assert relative_error(got, plain(layer, x)) < 1e-5


def test_decays() -> None:
    """31/32, 63/64, 127/128 and 255/256, at every token."""
    layer = Layer("retnet")
    log_decay = tiny.jit(layer.handed)(layer.params, random_input(2, 3))["main"]["log_decay"]
    gamma = np.broadcast_to(1 - 1 / np.array([32.0, 64.0, 128.0, 256.0]), (2, 3, 4))
    np.testing.assert_allclose(np.exp(np.asarray(log_decay, np.float64)), gamma, rtol=1e-8)


def test_sizes() -> None:
    """8 D^2 + V, and a state of H K V = 2 D^2 / H."""
    layer = Layer("retnet")
    assert layer.size() == 8 * 32**2 + 16
    assert layer.state_floats(8) == layer.state_floats(64) == 4 * 8 * 16 == 2 * 32**2 // 4


def test_matrices_decay_and_the_scale_of_the_norm_does_not() -> None:
    matrices = ("query", "key", "value", "gate", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    assert Layer("retnet").declared() == expected | {"norm/scale": ("vector", False)}


def test_refusals() -> None:
    assert "rope_theta=0.0 must be positive" in refusal("retnet", rope_theta=0.0)
    assert "RoPE needs an even K, got 1" in refusal("retnet", expand_k=0.125)
    assert "expand_k=0.3 times head_dim=8 is not a whole width" in refusal("retnet", expand_k=0.3)
    assert "expand_v=0.1 times head_dim=8 is not a whole width" in refusal("retnet", expand_v=0.1)
