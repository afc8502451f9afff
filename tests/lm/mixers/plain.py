"""Parts of layers in float64 numpy, from which the oracles of several mixers are built."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

NORM_EPS = 1e-5  # that of experiments/base.py


def double(tree: Any) -> Any:
    """The same arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def heads(x: np.ndarray, linear: Any) -> np.ndarray:
    """[B, T, D] -> [B, T, H, K]"""
    return np.einsum("btd,dhk->bthk", x, linear["kernel"])


def merged(o: np.ndarray, linear: Any) -> np.ndarray:
    """[B, T, H, V] -> [B, T, D]"""
    return np.einsum("bthv,hvd->btd", o, linear["kernel"])


def rms_normed(o: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Normalises over as many trailing dimensions as `scale` has."""
    axes = tuple(range(-scale.ndim, 0))
    return o / np.sqrt(np.mean(o**2, axis=axes, keepdims=True) + NORM_EPS) * scale


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def swish(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


def constant(params: Any, x: np.ndarray, name: str) -> tuple[Any, np.ndarray]:
    """Parameters and an input for which the projection `name` is the same at every token: it reads
    only column 0, which is 1.
    """
    x = x.copy()
    x[..., 0] = 1.0
    kernel = params[name]["kernel"].copy()
    kernel[1:] = 0.0
    return params | {name: {"kernel": kernel}}, x
