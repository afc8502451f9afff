"""Parts of recurrent layers in float64 numpy: short convolutions, delta rule, step sizes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lm import params as params_lib
from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [B, T, H, K], weight [H, K, W]. The last tap weighs the token itself."""
    taps = weight.shape[-1]
    out = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for back in range(min(taps, t + 1)):
            out[:, t] += weight[..., taps - 1 - back] * x[:, t - back]
    return out


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def unit(x: np.ndarray) -> np.ndarray:
    """Scales to Euclidean length one, with 1e-6 under the root."""
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, alpha: np.ndarray
) -> np.ndarray:
    """S_t = alpha (I - beta k k^T) S_{t-1} + beta k v^T, o = K^-1/2 S_t^T q; gates [B, T, H]."""
    rows, time, num_heads, key_dim = q.shape
    out = np.zeros(v.shape)
    for b, h in np.ndindex(rows, num_heads):
        state = np.zeros((key_dim, v.shape[-1]))
        for t in range(time):
            key, strength = k[b, t, h], beta[b, t, h]
            erased = np.eye(key_dim) - strength * np.outer(key, key)
            state = alpha[b, t, h] * erased @ state + strength * np.outer(key, v[b, t, h])
            out[b, t, h] = q[b, t, h] @ state / np.sqrt(key_dim)
    return out


def noise(shape: tuple[int, ...], low: float, high: float, seed: int = 3) -> np.ndarray:
    """Uniform float32, for parameters that near one would test nothing."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def initial(layer: Layer) -> Any:
    """The parameters of a new run."""
    x, ones = random_input(1, 2), np.ones((1, 2), np.int32)

    def init(key: jax.Array) -> Any:
        return params_lib.split(layer.mixer.init(key, x, ones, ones, None)["params"])[0]

    return tiny.jit(init)(jax.random.key(0))


def modes_of(ssm: Any) -> tuple[np.ndarray, np.ndarray]:
    """exp(dt A) and c (exp(dt A) - 1) / A of a diagonal state space, complex."""
    a = -np.exp(ssm["log_a"]) + 1j * ssm["frequency"]
    transition = np.exp(np.exp(ssm["log_dt"])[..., None] * a)
    return transition, (ssm["c_re"] + 1j * ssm["c_im"]) * (transition - 1) / a


def spaced(ssm: Any) -> Any:
    """Its parameters, with memories from one to hundreds of tokens, frequencies up to a third of a
    turn per token in both directions, and weights of any phase.
    """
    modes = ssm["log_a"].shape
    return ssm | {
        "log_dt": noise(modes[:-1], np.log(0.01), np.log(0.5)),
        "log_a": noise(modes, -1, 1, seed=4),
        "frequency": noise(modes, -4, 4, seed=5),
        "c_re": noise(modes, -1, 1, seed=6),
        "c_im": noise(modes, -1, 1, seed=7),
    }
