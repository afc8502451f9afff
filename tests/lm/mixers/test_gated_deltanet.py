"""Gated DeltaNet against the paper's recurrence, token by token, in float64."""

import functools
from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import constant, double, heads, merged, rms_normed, sigmoid, swish
from tests.lm.mixers.plain_recurrent import convolved, delta_rule, initial, noise, softplus, unit

TIME = 70  # whole chunks and part of another


@functools.cache
def program(*options: tuple[str, Any]) -> tuple[Layer, Any]:
    """The layer with these options, and its call, compiled once."""
    layer = Layer("gated_deltanet", **dict(options))
    return layer, tiny.jit(layer)


def lively(layer: Layer) -> Any:
    """Convolutions of either sign, and decays mostly between 0.5 and 0.99."""
    weight = noise(layer.params["conv"]["weight"].shape, -1, 1)
    rates = {"A_log": noise((4,), -2, 0), "dt_bias": noise((4,), -3, 0, seed=4)}
    return layer.params | {"conv": {"weight": weight}} | rates


def plain(params: Any, x: np.ndarray) -> np.ndarray:
    """Convolved projections, SiLU, unit keys and queries, the delta rule with decay, a norm per
    head, and the gate.
    """
    params = double(params)
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    weights = np.split(params["conv"]["weight"], np.cumsum([q.shape[-1], k.shape[-1]]), axis=1)
    q, k, v = (swish(convolved(a, w)) for a, w in zip((q, k, v), weights, strict=True))
    dt = softplus(x @ params["decay"]["kernel"] + params["dt_bias"])
    alpha = np.exp(-np.exp(params["A_log"]) * dt)
    out = delta_rule(unit(q), unit(k), v, sigmoid(x @ params["beta"]["kernel"]), alpha)
    gated = rms_normed(out, params["norm"]["scale"]) * swish(heads(x, params["gate"]))
    return merged(gated, params["out"])


@pytest.mark.parametrize(
    "options",
    [(), (("expand_k", 1.0), ("expand_v", 2.0), ("conv_size", 1))],
    ids=["defaults", "wide heads, no convolution"],
)
def test_equals_the_recurrence_of_the_paper(options: tuple[tuple[str, Any], ...]) -> None:
    (layer, run), x = program(*options), random_input(2, TIME)
    params = lively(layer)
    assert relative_error(run(params, x), plain(params, x)) < 1e-5


def test_without_decay_and_behind_an_open_gate_it_is_deltanet() -> None:
    layer, run = program()
    delta = Layer("deltanet", expand_k=0.75, expand_v=1.5)
    params, x = constant(lively(layer), random_input(2, TIME), "gate")
    params["gate"]["kernel"][0] = 1.2784645  # swish(1.2784645) is 1
    params["A_log"] = np.full(4, -50, np.float32)
    shared = {name: params[name] for name in delta.params}
    assert relative_error(run(params, x), tiny.jit(delta)(shared, x)) < 1e-5


def test_one_that_forgets_at_once_sees_as_far_as_its_convolution() -> None:
    (layer, run), x = program(), random_input(2, TIME)
    params = lively(layer) | {"A_log": np.full(4, 12, np.float32)}
    changed = x.copy()
    changed[:, :40] = random_input(2, 40, seed=5)
    out, other = run(params, x), run(params, changed)
    np.testing.assert_allclose(out[:, 43:], other[:, 43:], atol=1e-6)
    assert np.abs(out[:, 42] - other[:, 42]).max() > 1e-3


def test_initial_rates() -> None:
    """A is below 16, steps lie between 0.001 and 0.1, and the norm's scale is 1."""
    params = double(initial(Layer("gated_deltanet")))
    assert np.all((np.exp(params["A_log"]) > 0) & (np.exp(params["A_log"]) < 16))
    dt = softplus(params["dt_bias"])
    assert np.all((dt > 0.999e-3) & (dt < 0.1001))
    assert len(set(params["A_log"])) == len(set(dt)) == 4
    assert np.all(params["norm"]["scale"] == 1)


def test_sizes() -> None:
    """6 D^2 + 2 D H + 12 D + 2 H + V; state 1.125 D K' and the last 4 of 3 D inputs."""
    layer = Layer("gated_deltanet")
    assert layer.size() == 6 * 32**2 + 2 * 32 * 4 + 12 * 32 + 2 * 4 + 12
    assert layer.state_floats(8) == layer.state_floats(64) == 1.125 * 32 * 8 + 4 * 3 * 32


def test_all_but_rates_and_the_scale_of_the_norm_decays() -> None:
    matrices = ("query", "key", "value", "beta", "decay", "gate", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    expected |= dict.fromkeys(("A_log", "dt_bias", "norm/scale"), ("vector", False))
    assert Layer("gated_deltanet").declared() == expected | {"conv/weight": ("vector", True)}


def test_refusals() -> None:
    assert "conv_size=0 must be at least 1" in refusal("gated_deltanet", conv_size=0)
    assert "expand_k=0.75 times head_dim=2" in refusal("gated_deltanet", head_dim=2)
    assert "expand_v=0.1 times head_dim=8" in refusal("gated_deltanet", expand_v=0.1)
