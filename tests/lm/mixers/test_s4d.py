"""S4D against the state space of every channel, token by token, and its kernel, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from lm.modules.mixer import Along
from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, merged, sigmoid
from tests.lm.mixers.plain_recurrent import initial, modes_of, noise, spaced

TIME = 150  # whole chunks and part of another
N = 6


def lively(layer: Layer) -> Any:
    """State spaces of many kinds, and biases of either sign."""
    params = layer.params | {"ssm": spaced(layer.params["ssm"])}
    return params | {name: noise((32,), -1, 1) for name in ("value_bias", "gate_bias")}


def plain(params: Any, x: np.ndarray) -> np.ndarray:
    """The gated linear unit of the GELU of the state spaces."""
    params = double(params)
    transition, weight = modes_of(params["ssm"])
    channels = x.astype(np.float64).reshape(*x.shape[:2], *transition.shape[:2])
    state = np.zeros((x.shape[0], *transition.shape), complex)
    out = np.zeros(channels.shape)
    for t in range(x.shape[1]):
        state = transition * state + channels[:, t, ..., None]
        out[:, t] = 2 * np.sum(weight * state, axis=-1).real + params["ssm"]["D"] * channels[:, t]
    out = out * (1 + erf(out / np.sqrt(2))) / 2
    value, gate = (merged(out, params[name]) + params[f"{name}_bias"] for name in ("value", "gate"))
    return value * sigmoid(gate)


@pytest.mark.parametrize("num_heads", [4, 1])
def test_equals_the_recurrence_of_the_paper(num_heads: int) -> None:
    """For any number of heads that the channels are cut into."""
    layer, x = Layer("s4d", state_dim=N, num_heads=num_heads), random_input(2, TIME)
    params = lively(layer)
    assert relative_error(tiny.jit(layer)(params, x), plain(params, x)) < 1e-5


def slow(layer: Layer) -> Any:
    """State spaces that hardly change in a token, where exp(dt A) - 1 cancels; D is 0."""
    ssm = lively(layer)["ssm"]
    ssm |= {"log_dt": jnp.full_like(ssm["log_dt"], -7.0), "D": jnp.zeros_like(ssm["D"])}
    return lively(layer) | {"ssm": ssm | {"frequency": 0.0 * ssm["frequency"]}}


@pytest.mark.parametrize("draw", [lively, slow])
def test_an_impulse_shows_the_kernel_and_every_input_is_convolved_with_it(draw: Any) -> None:
    """K_l = 2 Re sum c (exp(dt A) - 1) / A exp(dt A l), and D at lag 0. Nothing wraps around."""
    layer = Layer("s4d", state_dim=N)
    params = draw(layer)

    def spaces(mixer: Any, x: jax.Array) -> jax.Array:
        run = Along(mixer, jnp.ones(x.shape[:2], jnp.int32), None)
        return mixer.ssm(x.reshape(*x.shape[:2], 4, 8), run, "main")

    x = random_input(2, TIME)
    x[0] = 0.0
    x[0, 0] = 1.0
    out = tiny.jit(lambda p, x: layer.mixer.apply({"params": p}, x, method=spaces))(params, x)
    transition, weight = modes_of(double(params["ssm"]))
    kernel = 2 * np.sum(weight * transition ** np.arange(TIME)[:, None, None, None], axis=-1).real
    kernel[0] += params["ssm"]["D"]
    assert relative_error(out[0], kernel) < 1e-5
    columns = zip(x[1].T, kernel.reshape(TIME, 32).T, strict=True)
    convolved = np.stack([np.convolve(a, b)[:TIME] for a, b in columns], axis=1)
    assert relative_error(out[1], convolved.reshape(TIME, 4, 8)) < 1e-5


def test_initial_modes() -> None:
    """A_n = -1/2 + i pi n, steps between 0.001 and 0.1, c of variance one."""
    ssm = double(initial(Layer("s4d"))["ssm"])
    a = -np.exp(ssm["log_a"]) + 1j * ssm["frequency"]
    np.testing.assert_allclose(a, np.broadcast_to(-0.5 + 1j * np.pi * np.arange(32), (4, 8, 32)))
    dt = np.exp(ssm["log_dt"])
    assert np.all((dt > 0.999e-3) & (dt < 0.1001))
    assert len(set(dt.flat)) == 32
    np.testing.assert_allclose(np.mean(ssm["c_re"] ** 2 + ssm["c_im"] ** 2), 1, rtol=0.15)
    assert np.all(ssm["D"] == 1)


@pytest.mark.parametrize("state_dim", [64, 6])
def test_sizes(state_dim: int) -> None:
    """2 D^2 + 2 D and D (2 N + 2); state D N / 2 complex numbers."""
    layer = Layer("s4d", state_dim=state_dim)
    assert layer.size() == 2 * 32**2 + 2 * 32 + 32 * (2 * state_dim + 2)
    assert layer.state_floats(8) == layer.state_floats(64) == 32 * state_dim


def test_only_matrices_decay() -> None:
    expected = {f"{name}/kernel": ("hidden", True) for name in ("value", "gate")}
    ssm = ("log_dt", "log_a", "frequency", "c_re", "c_im", "D")
    vectors = ["value_bias", "gate_bias", *(f"ssm/{name}" for name in ssm)]
    assert Layer("s4d").declared() == expected | dict.fromkeys(vectors, ("vector", False))


def test_refusals() -> None:
    assert "width=32 is not a multiple of num_heads=5" in refusal("s4d", num_heads=5)
    assert "state_dim=7 must be even: modes come in conjugate pairs" in refusal("s4d", state_dim=7)
    assert "state_dim=0" in refusal("s4d", state_dim=0)
