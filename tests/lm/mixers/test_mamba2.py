"""Mamba-2 against the paper's recurrence, token by token, in float64."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged, rms_normed, swish
from tests.lm.mixers.plain_recurrent import convolved, initial, noise, softplus

TIME = 70  # a whole chunk and part of another
H, P, N = 8, 8, 6


@functools.cache
def program(num_groups: int) -> tuple[Layer, Any]:
    """The layer, and its output and state, compiled once."""
    layer = Layer("mamba2", state_dim=N, num_groups=num_groups)

    def run(params: Any, x: Any) -> tuple[jax.Array, Any]:
        ones = np.ones(x.shape[:2], np.int32)
        empty = layer.mixer.init_state(x.shape[0], x.shape[1])
        return layer.mixer.apply({"params": params}, x, ones, ones, empty)

    return layer, tiny.jit(run)


def lively(layer: Layer) -> Any:
    """Convolutions of either sign with biases, and decays mostly between 0.5 and 0.99."""
    params = layer.params | {"A_log": noise((H,), -2, 0), "dt_bias": noise((H,), -3, 0, seed=4)}
    for name in ("conv", "group_conv"):
        shapes = {leaf: array.shape for leaf, array in layer.params[name].items()}
        params[name] = {leaf: noise(shape, -1, 1) for leaf, shape in shapes.items()}
    return params


def plain(params: Any, x: np.ndarray, num_groups: int, *, remember: bool = True) -> np.ndarray:
    """For every head h = exp(dt A) h + dt B x^T and y = C h + D x, with the B and C of group h //
    (H / G). Then come the gate, a norm of each group's heads, and the projection back.
    """
    params = double(params)

    def short(name: str, linear: str) -> np.ndarray:
        conv = params[name]
        return swish(convolved(heads(x, params[linear]), conv["weight"]) + conv["bias"])

    values, shared = short("conv", "value"), short("group_conv", "shared")
    dt = softplus(x @ params["dt"]["kernel"] + params["dt_bias"])
    rate = -np.exp(params["A_log"])
    out = np.zeros(values.shape)
    for b, h in np.ndindex(x.shape[0], H):
        group, state = h // (H // num_groups), np.zeros((N, P))
        for t in range(x.shape[1]):
            written = dt[b, t, h] * np.outer(shared[b, t, group], values[b, t, h])
            state = np.exp(dt[b, t, h] * rate[h]) * state * remember + written
            read = shared[b, t, num_groups + group] @ state
            out[b, t, h] = read + params["D"][h] * values[b, t, h]
    out = out * swish(heads(x, params["gate"]))
    parts = zip(
        np.split(out, num_groups, 2), np.split(params["norm"]["scale"], num_groups), strict=True
    )
    return merged(np.concatenate([rms_normed(*part) for part in parts], axis=2), params["out"])


@pytest.mark.parametrize("num_groups", [1, 2])
def test_equals_the_recurrence_of_the_paper(num_groups: int) -> None:
    (layer, run), x = program(num_groups), random_input(2, TIME)
    params = lively(layer)
    out, _ = run(params, x)
    assert relative_error(out, plain(params, x, num_groups)) < 1e-5


def test_one_that_forgets_at_once_reads_its_own_token() -> None:
    """A = -infinity: y = dt (C . B) x + D x."""
    (layer, run), x = program(2), random_input(2, TIME)
    params = lively(layer) | {"A_log": np.full(H, 12, np.float32)}
    assert relative_error(run(params, x)[0], plain(params, x, 2, remember=False)) < 1e-5


def test_without_b_and_without_steps_only_the_skip_is_left() -> None:
    (layer, run), x = program(2), random_input(2, TIME)
    still = lively(layer) | {"dt_bias": np.full(H, -200, np.float32)}
    params = lively(layer)
    blank = params | {"shared": {"kernel": params["shared"]["kernel"].copy()}}
    blank["group_conv"] = {"weight": params["group_conv"]["weight"], "bias": np.zeros((4, N))}
    blank["shared"]["kernel"][:, :2] = 0.0  # B; C stays
    want = plain(blank, x, 2)
    for changed in (still, blank):
        out, state = run(changed, x)
        assert relative_error(out, want) < 1e-5
        assert not np.any(state["main"].s)


def test_a_step_of_zero_freezes_the_state() -> None:
    """Steps are zero where column 0 is -1, so nothing of these tokens reaches the state."""
    (layer, run), x = program(2), random_input(2, TIME)
    params = lively(layer)
    kernel = params["dt"]["kernel"].copy()
    kernel[0] = 300.0
    x[..., 0] = np.where(np.arange(TIME) < 20, 0.0, -1.0)
    other = np.concatenate([x[:, :20], random_input(2, TIME, seed=6)[:, 20:]], axis=1)
    other[..., 0] = x[..., 0]
    states = [run(params | {"dt": {"kernel": kernel}}, a)[1]["main"].s for a in (x, other)]
    assert np.any(states[0])
    np.testing.assert_array_equal(*states)


def test_initial_rates() -> None:
    """A lies between 1 and 16, steps between 0.001 and 0.1; D is one, biases are zero."""
    params = double(initial(program(1)[0]))
    assert np.all((np.exp(params["A_log"]) >= 1) & (np.exp(params["A_log"]) <= 16))
    dt = softplus(params["dt_bias"])
    assert np.all((dt > 0.999e-3) & (dt < 0.1001))
    assert np.all(params["D"] == 1)
    assert not np.any(params["conv"]["bias"])


@pytest.mark.parametrize("num_groups", [1, 2])
def test_sizes(num_groups: int) -> None:
    """D (2 E + 2 G N + H) + 5 (E + 2 G N) + 3 H + E + E D; state E N and 4 (E + 2 G N)."""
    layer, inner, channels = program(num_groups)[0], 64, 64 + 2 * num_groups * N
    assert layer.size() == 32 * (inner + channels + H) + 5 * channels + 3 * H + inner + inner * 32
    assert layer.state_floats(8) == layer.state_floats(64) == inner * N + 4 * channels


def test_rates_skips_biases_and_the_scale_of_the_norm_do_not_decay() -> None:
    matrices = ("gate", "value", "shared", "dt", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    expected |= dict.fromkeys(("conv/weight", "group_conv/weight"), ("vector", True))
    vectors = ("A_log", "dt_bias", "D", "norm/scale", "conv/bias", "group_conv/bias")
    assert program(1)[0].declared() == expected | dict.fromkeys(vectors, ("vector", False))


def test_refusals() -> None:
    message = refusal("mamba2", num_groups=3)
    assert "expand * width = 64 must be whole heads of head_dim=8" in message
    assert "a multiple of num_groups=3" in message
    assert "whole heads of head_dim=24" in refusal("mamba2", head_dim=24)
    assert "state_dim=0" in refusal("mamba2", state_dim=0)
    assert "conv_size=0 must be at least 1" in refusal("mamba2", conv_size=0)
