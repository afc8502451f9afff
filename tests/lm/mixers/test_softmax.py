"""The softmax mixer: position encodings, query-key norm, window, grouped heads. Decoding equals one
call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import UserError
from lm.mixers.softmax import Softmax
from lm.modules.heads import HeadMixer
from lm.params import ParamInfo
from tests.lm import tiny

T = 21


def mixer(**options: Any) -> HeadMixer:
    """Width 32, 4 query heads on 2 key heads of width 8, as the model's builder makes it."""
    layers = {"layer": {"mixer": "softmax"} | options}
    built = tiny.create({"model.layers": layers, "model.pattern": "layer"})
    return built.model.groups[0].blocks[0].mixer


def parameters(module: HeadMixer, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"query": (32, 4, 8), "key": (32, 2, 8), "value": (32, 2, 8), "out": (4, 8, 32)}
    params: dict[str, Any] = {
        name: {"kernel": rng.normal(0, 0.3, shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    if module.qk_norm:
        for name in ("query_norm", "key_norm"):
            params[name] = {"scale": 1 + 0.3 * rng.standard_normal(8).astype(np.float32)}
    if isinstance(module, Softmax) and module.sink:
        params["sink"] = rng.standard_normal(4).astype(np.float32)
    return params


@functools.cache
def sequence(seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((2, T, 32)).astype(np.float32)


def plain(params: Any, x: Any, module: Any) -> Any:
    """Attention of one document, written out in numpy float64."""
    q, k, v = (
        np.einsum("btd,dhk->bthk", x, params[n]["kernel"]) for n in ("query", "key", "value")
    )
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    if module.qk_norm:
        rms = lambda a: a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + 1e-5)
        q, k = rms(q) * params["query_norm"]["scale"], rms(k) * params["key_norm"]["scale"]
    index = np.arange(x.shape[1])
    distance = index[:, None] - index[None, :]
    k, v = (np.repeat(a, 2, axis=2) for a in (k, v))  # query heads 0, 1 read key head 0
    logits = np.einsum("bthk,bshk->bhts", q, k) / 8  # muP: 1 / head_dim
    if module.position_encoding == "rope":
        beyond = np.minimum(distance, module.distance_ceiling)
        is_near = distance < (module.window or 10**9)
        seen_from = np.where(is_near, distance, beyond)  # R(i) q . R(j) k = R(i - j) q . k
        angle = seen_from[..., None] * module.rope_theta ** (-np.arange(4) / 4)
        q, k = (a[..., :4] + 1j * a[..., 4:] for a in (q, k))
        product = np.einsum("bthc,bshc,tsc->bhts", q, k.conj(), np.exp(1j * angle))
        logits = product.real / 8
    if module.position_encoding == "alibi":
        slopes = 2.0 ** (-8 * (np.arange(4) + 1) / 4)
        logits = logits - slopes[:, None, None] * distance
    if module.logits_soft_cap:
        logits = module.logits_soft_cap * np.tanh(logits / module.logits_soft_cap)
    near = distance < (module.window or 10**9)
    seen = (distance >= 0) & (near | (index < module.global_tokens))
    if module.block:
        seen &= index[:, None] // module.block == index // module.block
    weights = np.exp(np.where(seen, logits, -np.inf))
    sunk = np.exp(params["sink"])[:, None, None] if module.sink else 0.0
    weights /= weights.sum(axis=-1, keepdims=True) + sunk
    out = np.einsum("bhts,bshv->bthv", weights, v)
    return np.einsum("bthv,hvd->btd", out, params["out"]["kernel"])


OPTIONS: list[dict[str, Any]] = [
    {"rope_theta": 100.0},
    {"position_encoding": "alibi", "window": 5},
    {"position_encoding": "none", "logits_soft_cap": 1.5},
    {"qk_norm": True, "window": 1},
    {"rope_theta": 100.0, "block": 6, "sink": True},
    {"rope_theta": 100.0, "window": 5, "global_tokens": 2, "distance_ceiling": 4},
]


def whole_and_steps(module: HeadMixer, prefill: int) -> Any:
    """The output of one call, and that of a prefill followed by steps."""

    def run(params: Any, x: Any) -> Any:
        variables = {"params": params}
        ones = jnp.ones(x.shape[:2], jnp.int32)
        index = jnp.broadcast_to(jnp.arange(x.shape[1]), ones.shape)
        whole, _ = module.apply(variables, x, ones, index, None)
        state = module.init_state(*x.shape[:2])
        first = (x[:, :prefill], ones[:, :prefill], index[:, :prefill])
        out, state = module.apply(variables, *first, state)

        def step(state: Any, inputs: Any) -> Any:
            token, position = inputs
            y, state = module.apply(variables, token, position, state, method="step")
            return state, y

        rest = (x[:, prefill:].swapaxes(0, 1), index[:, prefill:].T)
        return whole, jnp.concatenate([out, jax.lax.scan(step, state, rest)[1].swapaxes(0, 1)], 1)

    return tiny.jit(run)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_equals_plain_attention_in_one_call_and_in_steps(options: dict[str, Any]) -> None:
    module = mixer(**options)
    params = parameters(module)
    whole, steps = whole_and_steps(module, 13)(params, sequence())
    expected = plain(params, sequence(), module)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(steps, expected, rtol=1e-4, atol=1e-5)


def test_options_reach_the_op() -> None:
    module = mixer(window=7, logits_soft_cap=30.0, position_encoding="alibi", head_dim=16)
    assert module.op_options() == {
        "scale": 1 / 16,
        "window": 7,
        "alibi": True,
        "logits_soft_cap": 30.0,
        "sink": False,
        "block": 0,
        "global_tokens": 0,
        "distance_ceiling": 0,
        "rope_theta": 0.0,
    }
    assert module.dims() == {"H": 4, "G": 2, "K": 16, "V": 16}


def test_a_ceiling_hands_rotations_to_the_op() -> None:
    infinite = {"window": 9, "global_tokens": 2, "distance_ceiling": 9, "rope_theta": 50.0}
    assert mixer(**infinite).op_options()["rope_theta"] == 50.0
    with pytest.raises(UserError, match=r"needs rope_theta=0\.0 to be positive"):
        mixer(position_encoding="none", **infinite)


def test_the_sink_is_a_vector_without_decay_and_only_there_when_asked_for() -> None:
    layers = {"layer": {"mixer": "softmax", "sink": True}}
    built = tiny.create({"model.layers": layers, "model.pattern": "layer"})
    info = built.infos["groups_0"]["blocks_0"]["mixer"]["sink"]
    assert info == ParamInfo("L H", (1, 4), "vector", decay=False)
    assert (
        "sink"
        not in tiny.create({"model.pattern": "softmax"}).infos["groups_0"]["blocks_0"]["mixer"]
    )
