"""What every feed-forward in lm/feed_forward must do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.families import FEED_FORWARDS
from tests.lm import tiny

NAMES = FEED_FORWARDS.names()


def made(name: str, **changes: Any) -> tuple[Any, Any]:
    """A feed-forward of a tiny model, and random parameters."""
    built = tiny.create({"model.mlp": {"family": name}} | changes)
    params = tiny.params(built)["groups_0"]["blocks_0"]["mlp"]
    return built.model.groups[0].blocks[0].mlp, jax.tree.map(lambda x: jnp.asarray(x[0]), params)


def output(mlp: Any, params: Any, x: jax.Array) -> jax.Array:
    out = mlp.apply({"params": params}, x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_by_itself(name: str) -> None:
    mlp, params = made(name)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)), jnp.float32)
    whole = output(mlp, params, x)
    assert whole.shape == x.shape
    assert whole.dtype == x.dtype
    for t in range(5):
        one = output(mlp, params, x[:, t])
        np.testing.assert_allclose(one, whole[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        output(mlp, params, x[:, ::-1]), whole[:, ::-1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    mlp, params = made(name)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64, 32)), jnp.float32)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(output(mlp, p, x))))(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_of_the_precision(name: str) -> None:
    mlp, params = made(name, **{"model.precision": "bfloat16"})
    assert output(mlp, params, jnp.ones((1, 2, 32), jnp.bfloat16)).dtype == jnp.bfloat16
