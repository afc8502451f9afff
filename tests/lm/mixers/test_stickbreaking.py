"""The stick-breaking mixer, compared with a stick broken key by key. Decoding equals one call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.build import Build
from lm.config import UserError
from lm.params import ParamInfo
from tests.lm import tiny

T = 19


def create(**options: Any) -> Build:
    layers = {"layer": {"mixer": "stickbreaking"} | options}
    return tiny.create({"model.layers": layers, "model.pattern": "layer"})


def parameters(built: Build) -> Any:
    """The mixer's parameters without the leading layer dimension."""
    params = tiny.params(built)["groups_0"]["blocks_0"]["mixer"]
    return jax.tree.map(lambda x: 2 * x[0], params)


def broken(params: Any, x: Any, remainder: str, attend_current: bool) -> Any:
    """From the nearest key to the farthest, each takes sigmoid(logit) of what is left."""
    q, k, v = (
        np.einsum("btd,dhk->bthk", x, params[n]["kernel"]) for n in ("query", "key", "value")
    )
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        group, left = h // 2, 1.0  # query heads 0, 1 read key head 0
        for s in range(t if attend_current else t - 1, -1, -1):
            taken = left / (1 + np.exp(-q[b, t, h] @ k[b, s, group] / 8))  # muP: 1 / head_dim
            out[b, t, h] += taken * v[b, s, group]
            left -= taken
        if remainder == "value":
            out[b, t, h] += left * v[b, t, group]
        if remainder == "bias":
            out[b, t, h] += left * params["remainder_bias"][h]
    return np.einsum("bthv,hvd->btd", out, params["out"]["kernel"])


@pytest.mark.parametrize(
    ("remainder", "attend_current"), [("none", False), ("value", False), ("bias", True)]
)
def test_equals_the_stick_in_one_call_and_in_steps(remainder: str, attend_current: bool) -> None:
    built = create(remainder=remainder, attend_current=attend_current)
    module = built.model.groups[0].blocks[0].mixer
    params = parameters(built)
    x = np.random.default_rng(1).standard_normal((2, T, 32)).astype(np.float32)

    @tiny.jit
    def run(params: Any, x: Any) -> Any:
        variables, ones = {"params": params}, jnp.ones((2, T), jnp.int32)
        positions = jnp.zeros((2, T), jnp.int32)  # nothing here encodes positions
        whole, _ = module.apply(variables, x, ones, positions, None)
        first = (x[:, :11], ones[:, :11], positions[:, :11])
        out, state = module.apply(variables, *first, module.init_state(2, T))

        def step(state: Any, token: Any) -> Any:
            y, state = module.apply(variables, token, positions[:, 0], state, method="step")
            return state, y

        _, rest = jax.lax.scan(step, state, x[:, 11:].swapaxes(0, 1))
        return whole, jnp.concatenate([out, rest.swapaxes(0, 1)], axis=1)

    whole, steps = run(params, x)
    expected = broken(params, x, remainder, attend_current)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(steps, expected, rtol=1e-4, atol=1e-5)


def test_the_bias_is_a_vector_without_decay_and_only_there_when_asked_for() -> None:
    info = create(remainder="bias").infos["groups_0"]["blocks_0"]["mixer"]["remainder_bias"]
    assert info == ParamInfo("L H V", (1, 4, 8), "vector", decay=False)
    assert "remainder_bias" not in create().infos["groups_0"]["blocks_0"]["mixer"]


def test_the_tolerance_reaches_the_op_and_is_checked() -> None:
    module = create(tolerance=1e-3).model.groups[0].blocks[0].mixer
    assert module.op_options()["tolerance"] == 1e-3
    with pytest.raises(
        UserError, match=r"model.layers.layer: .*tolerance=1.0 must lie in \[0, 1\)"
    ):
        create(tolerance=1.0)


def test_the_first_token_of_a_document_gets_nothing() -> None:
    """It has no key before it and the remainder is off, so the layer adds nothing to the residual
    stream.
    """
    built = create()
    module = built.model.groups[0].blocks[0].mixer
    x = np.random.default_rng(2).standard_normal((1, 8, 32)).astype(np.float32)
    segment_ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0]], np.int32)
    out = tiny.jit(module.apply)({"params": parameters(built)}, x, segment_ids, segment_ids, None)[
        0
    ]
    norms = np.linalg.norm(out[0], axis=-1)
    assert np.flatnonzero(norms).tolist() == [1, 2, 4]
