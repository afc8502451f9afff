"""LightNet against a softmax over time, and its recurrence's invariants, in float64."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, refusal, relative_error
from tests.lm.mixers.plain import constant, double, heads, merged, rms_normed, swish

TIME = 70  # a whole chunk and part of another


def plain(params: Any, x: np.ndarray, *, uniform: bool = False) -> np.ndarray:
    """Each channel of the state is the mean of the values so far, weighted by a softmax of its keys
    over time. With `uniform` it is the plain mean.
    """
    params = double(params)
    q, k, v = (heads(x, params[name]) for name in ("query", "key", "value"))
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        shares = np.exp(k[b, : t + 1, h] * (not uniform))
        state = (shares / shares.sum(axis=0)).T @ v[b, : t + 1, h]
        out[b, t, h] = swish(q[b, t, h]) @ state / q.shape[-1]  # muP: 1 / K
    gate = heads(x @ params["gate"]["down"]["kernel"], params["gate"]["up"])
    return merged(rms_normed(out, params["norm"]["scale"]) * swish(gate), params["out"])


@pytest.mark.parametrize(
    "options",
    [{}, {"gate_rank": 3, "expand_k": 0.5, "expand_v": 2.0}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_equals_the_softmax_over_time(options: dict[str, Any]) -> None:
    layer, x = Layer("lightnet", **options), random_input(2, TIME)
    assert relative_error(tiny.jit(layer)(layer.params, x), plain(layer.params, x)) < 1e-5


def test_constant_keys_give_the_cumulative_mean_and_constants_in_keys_nothing() -> None:
    layer = Layer("lightnet")
    run = tiny.jit(layer)
    params, x = constant(layer.params, random_input(2, TIME), "key")
    want = plain(params, x, uniform=True)
    assert relative_error(run(params, x), want) < 1e-5
    kernel = layer.params["key"]["kernel"].copy()
    kernel[0] += 5.0 * np.arange(-2, 2)[:, None]  # column 0 of x is 1: a constant per head
    moved = layer.params | {"key": {"kernel": kernel}}
    assert relative_error(run(moved, x), plain(layer.params, x)) < 1e-5


def test_a_key_far_above_all_before_takes_the_whole_state() -> None:
    """exp g_t = 1 - k'_t is kept above 2^-20, so that its logarithm and its gradient are finite."""
    layer = Layer("lightnet")
    run = jax.value_and_grad(lambda params, x: layer(params, x)[:, -1].sum())
    params, x = constant(layer.params, random_input(1, 9), "key")
    x[0, :, 0] = 0.0
    x[0, -1, 0] = 300.0
    value, grads = tiny.jit(run)(params, x)
    assert relative_error(value, plain(params, x)[:, -1].sum()) < 1e-5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_what_is_written_and_what_is_kept_sum_to_one() -> None:
    """k' + exp g = 1 in every channel; the first token's k' is 1."""
    layer = Layer("lightnet")
    summed = lambda inputs: jax.lax.cumlogsumexp(inputs["x"], axis=1)
    handed = tiny.jit(lambda params, x: layer.handed(params, x, sum=summed))
    main = double(handed(layer.params, random_input(2, TIME))["main"])
    np.testing.assert_array_equal(main["k"][:, 0], 1.0)
    np.testing.assert_allclose(main["k"] + np.exp(main["log_decay"]), 1.0, atol=2e-6)
    assert np.isfinite(main["log_decay"]).all()


def test_sizes() -> None:
    """4 D^2 + 2 D R + D, and a state of H K V + 2 H K: linear_scan's has two parts."""
    layer = Layer("lightnet")
    assert layer.size() == 4 * 32**2 + 2 * 32 * 128 + 32
    assert Layer("lightnet", gate_rank=3).size() == 4 * 32**2 + 2 * 32 * 3 + 32
    assert layer.state_floats(8) == layer.state_floats(64) == 4 * 8 * 8 + 2 * 4 * 8


def test_matrices_decay_and_the_scale_of_the_norm_does_not() -> None:
    matrices = ("query", "key", "value", "gate/down", "out")
    expected = {f"{name}/kernel": ("hidden", True) for name in matrices}
    expected["gate/up/kernel"] = ("input", True)  # it sums over a rank that does not grow
    assert Layer("lightnet").declared() == expected | {"norm/scale": ("vector", False)}


def test_refusals() -> None:
    assert "gate_rank=0 must be at least 1" in refusal("lightnet", gate_rank=0)
    assert "expand_k=0.3 times head_dim=8 is not a whole width" in refusal("lightnet", expand_k=0.3)
    assert "expand_v=0.3 times head_dim=8 is not a whole width" in refusal("lightnet", expand_v=0.3)
