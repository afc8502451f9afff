"""BaseConv against its taps, one by one, in float64."""

from typing import Any

import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import double, heads, merged

TIME = 21


def plain(params: Any, x: np.ndarray) -> np.ndarray:
    """W_o ((W_g x + b_g) * (h * (W_u x) + b_h)); tap i of W reads the token W - 1 - i before."""
    params = double(params)
    u, filters = heads(x, params["input"]), params["filter"]
    convolved = np.zeros(u.shape) + params["filter_bias"]
    for t in range(u.shape[1]):
        for back in range(min(t + 1, filters.shape[-1])):
            convolved[:, t] += filters[..., -1 - back] * u[:, t - back]
    gate = heads(x, params["gate"]) + params["gate_bias"]
    return merged(gate * convolved, params["out"])


@pytest.mark.parametrize(
    "options",
    [{}, {"expand": 1, "conv_size": 1}, {"conv_size": 7, "num_heads": 2}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_taps(options: dict[str, Any]) -> None:
    layer, x = Layer("base_conv", **options), random_input(2, TIME)
    assert relative_error(tiny.jit(layer)(layer.params, x), plain(layer.params, x)) < 1e-5


def test_a_token_is_seen_as_long_as_the_filter_is() -> None:
    """A token changes its own output and the next two. The gate reads only the token itself."""
    layer, x = Layer("base_conv"), random_input(1, 9)
    changed = x.copy()
    changed[0, 4] += 1.0
    run = tiny.jit(layer)
    difference = np.asarray(run(layer.params, changed) - run(layer.params, x))
    assert np.flatnonzero(np.abs(difference[0]).max(axis=-1)).tolist() == [4, 5, 6]


def test_zero_input_gives_the_product_of_the_biases() -> None:
    layer = Layer("base_conv")
    out = tiny.jit(layer)(layer.params, np.zeros((1, 5, 32), np.float32))
    both = layer.params["gate_bias"] * layer.params["filter_bias"]
    want = merged(np.broadcast_to(both, (1, 5, *both.shape)), layer.params["out"])
    assert relative_error(out, want) < 1e-6


def test_the_number_of_heads_is_only_a_cut() -> None:
    """The same matrices give the same function, cut into one head or four."""
    cut, whole = Layer("base_conv"), Layer("base_conv", num_heads=1)
    assert cut.size() == whole.size()
    params = {
        name: tree.reshape(whole.params[name].shape)
        if isinstance(tree, np.ndarray)
        else {"kernel": tree["kernel"].reshape(whole.params[name]["kernel"].shape)}
        for name, tree in cut.params.items()
    }
    x = random_input(1, 5)
    got = tiny.jit(whole)(params, x)
    assert relative_error(got, plain(cut.params, x)) < 1e-5


def test_sizes() -> None:
    """3 expand D^2 + expand D (W + 2), and a state of expand D W."""
    layer, other = Layer("base_conv"), Layer("base_conv", expand=2, conv_size=5)
    assert layer.size() == 12 * 32**2 + 4 * 32 * 5
    assert layer.state_floats(8) == layer.state_floats(64) == 4 * 32 * 3
    assert other.size() == 6 * 32**2 + 2 * 32 * 7
    assert other.state_floats() == 2 * 32 * 5


def test_matrices_and_the_filter_decay_and_biases_do_not() -> None:
    """The filter has a few numbers a channel, so its learning rate does not shrink with
    the width.
    """
    expected = {f"{name}/kernel": ("hidden", True) for name in ("input", "gate", "out")}
    biases = dict.fromkeys(("filter_bias", "gate_bias"), ("vector", False))
    assert Layer("base_conv").declared() == expected | biases | {"filter": ("vector", True)}


def test_refusals() -> None:
    assert "expand=0, conv_size=3 must be at least 1" in refusal("base_conv", expand=0)
    assert "expand=4, conv_size=0 must be at least 1" in refusal("base_conv", conv_size=0)
    message = refusal("base_conv", num_heads=3)
    assert "expand * width = 128 is not a multiple of num_heads=3" in message
