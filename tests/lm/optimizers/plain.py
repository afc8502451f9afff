"""Steps of an optimizer, compared with a float64 loop written from its paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import mup, optimizers
from lm.families import OPTIMIZERS
from lm.params import ParamInfo

RATE = 0.03
# Two stacked layers of a matrix into heads, [5, 2 * 3] each, and of a norm; an embedding.
INFOS = {
    "query": ParamInfo("L D H K", (2, 5, 2, 3), "hidden", True, 1),
    "norm": ParamInfo("L D", (2, 5), "vector", False),
    "table": ParamInfo("vocab D", (7, 5), "input", True),
}
ONES = mup.Multipliers(
    width=1.0,
    embedding=1.0,
    residual=1.0,
    attention_exponent=-1.0,
    base_init_std=0.1,
    width_exponent=-1.0,
    is_scale_free=True,
)
Tree = dict[str, np.ndarray]


def draw(seed: int, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.standard_normal(i.shape)).astype(np.float32) for k, i in INFOS.items()}


def ours(options: dict[str, Any], grads: list[Tree]) -> Tree:
    """The parameters after one step for each gradient, with a constant rate and without
    clipping.
    """
    config = OPTIMIZERS.create({"clip_norm": 1e9, "spike_ratio": 0.0} | options, "optimizer")
    tx = optimizers.create(config, ONES, INFOS)
    extra = {"rate": jnp.float32(RATE), "decay": optimizers.decays(config, ONES, RATE)}
    update = jax.jit(lambda g, state, w: tx.update(g, state, w, loss=jnp.float32(1.0), **extra))
    w: Any = draw(0)
    state = tx.init(jax.tree.map(jnp.asarray, w))
    for g in grads:
        updates, state = update(g, state, w)
        w = jax.tree.map(jnp.add, w, updates)
    return {key: np.asarray(value, np.float64) for key, value in w.items()}


def layers(tree: Tree) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields every matrix [rows, columns] and vector in float64: name, layer, array."""
    for key, info in INFOS.items():
        for i, (x) in enumerate(tree[key] if info.is_stacked else tree[key][None]):
            yield key, i, np.asarray(x, np.float64).reshape(x.shape[0], -1).squeeze()


def check(
    options: dict[str, Any], step: Callable[[dict[str, Any], str, np.ndarray, np.ndarray], Any]
) -> None:
    """Compares four of our steps with `step(state, name, w, g) -> w`. Each matrix or vector has its
    own `state`, a dict that is empty at first.
    """
    grads = [draw(i, scale=0.1 * i) for i in range(1, 5)]
    wanted = {(key, i): w for key, i, w in layers(draw(0))}
    states: dict[Any, dict[str, Any]] = {place: {} for place in wanted}
    for tree in grads:
        for key, i, g in layers(tree):
            wanted[key, i] = step(states[key, i], key, wanted[key, i], g)
    for key, i, w in layers(ours(options, grads)):
        np.testing.assert_allclose(w, wanted[key, i], rtol=2e-5, atol=2e-6, err_msg=f"{key} {i}")


def adam(state: dict[str, Any], g: np.ndarray, beta1: float, beta2: float, eps: float) -> Any:
    """The direction of algorithm 1 of arXiv 1412.6980."""
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    return m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
