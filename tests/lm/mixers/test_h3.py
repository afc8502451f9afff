"""H3 against its two state spaces, token by token, in float64."""

import functools
from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged
from tests.lm.mixers.plain_recurrent import initial, modes_of, noise, spaced

TIME = 70  # a whole chunk and part of another
N, TAPS = 6, 5


@functools.cache
def program() -> tuple[Layer, Any]:
    layer = Layer("h3", state_dim=N, shift_taps=TAPS)
    return layer, tiny.jit(layer)


def lively(layer: Layer) -> Any:
    """State spaces of many kinds, and taps of either sign."""
    shift = noise(layer.params["shift"].shape, -1, 1, seed=8)
    return layer.params | {"ssm": spaced(layer.params["ssm"]), "shift": shift}


def plain(params: Any, x: np.ndarray) -> np.ndarray:
    """y = W_o (q * SSM_diag(SSM_shift(k) * v)). The state of the shift holds the last W keys; its
    last weight is for the newest.
    """
    params = double(params)
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    transition, weight = modes_of(params["ssm"])
    keys = np.zeros((*k.shape[:1], *params["shift"].shape))
    state = np.zeros((x.shape[0], *transition.shape), complex)
    out = np.zeros(v.shape)
    for t in range(x.shape[1]):
        keys = np.concatenate([keys[..., 1:], k[:, t, ..., None]], axis=-1)
        shifted = np.sum(keys * params["shift"], axis=-1) + params["shift_D"] * k[:, t]
        written = shifted * v[:, t]
        state = transition * state + written[..., None]
        read = 2 * np.sum(weight * state, axis=-1).real + params["ssm"]["D"] * written
        out[:, t] = q[:, t] * read
    return merged(out, params["out"])


def test_equals_the_recurrence_of_the_paper() -> None:
    (layer, run), x = program(), random_input(2, TIME)
    params = lively(layer)
    assert relative_error(run(params, x), plain(params, x)) < 1e-5


@pytest.mark.parametrize("back", [1, TAPS - 1])
def test_one_weight_alone_is_a_pure_shift(back: int) -> None:
    """A state space without c passes its input on, so y = W_o (q_t k_{t - back} v_t)."""
    (layer, run), x = program(), random_input(2, TIME)
    shift = np.zeros((4, 8, TAPS), np.float32)
    shift[..., TAPS - 1 - back] = 1.0
    zeros = np.zeros((4, 8, N // 2), np.float32)
    ssm = layer.params["ssm"] | {"c_re": zeros, "c_im": zeros, "D": np.ones((4, 8), np.float32)}
    params = layer.params | {"shift": shift, "shift_D": np.zeros((4, 8), np.float32), "ssm": ssm}
    q, k, v = (heads(x, double(params[name])) for name in ("query", "key", "value"))
    late = np.concatenate([np.zeros((2, back, 4, 8)), k[:, :-back]], axis=1)
    want = merged(q * late * v, double(params["out"]))
    out = np.asarray(run(params, x))
    assert not np.any(out[:, :back])
    assert relative_error(out, want) < 1e-5


def test_the_output_is_linear_in_keys_values_and_queries() -> None:
    """There is no softmax or activation, so scaling one of the three projections scales
    the output.
    """
    (layer, run), x = program(), random_input(2, TIME)
    params = lively(layer)
    out = run(params, x)
    for name in ("query", "key", "value"):
        scaled = params | {name: {"kernel": -3 * params[name]["kernel"]}}
        assert relative_error(run(scaled, x), -3 * out) < 1e-5


def test_initial_values() -> None:
    """A_n = -1/2 + i pi n. The taps together have variance one, and both skips are one."""
    params = double(initial(Layer("h3")))
    ssm = params["ssm"]
    a = -np.exp(ssm["log_a"]) + 1j * ssm["frequency"]
    np.testing.assert_allclose(a, np.broadcast_to(-0.5 + 1j * np.pi * np.arange(32), (4, 8, 32)))
    np.testing.assert_allclose(np.mean(np.sum(params["shift"] ** 2, axis=-1)), 1, rtol=0.15)
    assert np.all(ssm["D"] == 1)
    assert np.all(params["shift_D"] == 1)


@pytest.mark.parametrize(("state_dim", "taps"), [(64, 64), (N, TAPS)])
def test_sizes(state_dim: int, taps: int) -> None:
    """4 D^2 + D (W + 1) and D (2 N + 2); state D N / 2 complex numbers and D W."""
    layer = Layer("h3", state_dim=state_dim, shift_taps=taps)
    assert layer.size() == 4 * 32**2 + 32 * (taps + 1) + 32 * (2 * state_dim + 2)
    assert layer.state_floats(8) == layer.state_floats(64) == 32 * state_dim + 32 * taps


def test_only_matrices_decay() -> None:
    matrices = ("query", "key", "value", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    ssm = ("log_dt", "log_a", "frequency", "c_re", "c_im", "D")
    vectors = ["shift", "shift_D", *(f"ssm/{name}" for name in ssm)]
    assert program()[0].declared() == expected | dict.fromkeys(vectors, ("vector", False))


def test_refusals() -> None:
    assert "width=32 is not a multiple of num_heads=5" in refusal("h3", num_heads=5)
    assert "state_dim=7 must be even: modes come in conjugate pairs" in refusal("h3", state_dim=7)
    assert "shift_taps=0 must be at least 1" in refusal("h3", shift_taps=0)
