"""What every block in lm/blocks must do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.families import BLOCKS
from tests.lm import tiny

ROWS, TIME, WIDTH = 2, 5, 32
MIXERS = ("softmax", "gla")  # one with a growing state, one with a constant one


def made(name: str, mixer: str, mlp: str) -> tuple[Any, Any]:
    layer = {"mixer": mixer, "residual": {"family": name}}
    layer |= {"mlp": "none"} if mlp == "none" else {}
    changes = {"model.layers": {"a": layer}, "model.pattern": "a", "model.num_kv_heads": 4}
    built = tiny.create(changes)
    params = tiny.params(built)["groups_0"]["blocks_0"]
    return built.model.groups[0].blocks[0], jax.tree.map(lambda x: jnp.asarray(x[0]), params)


@pytest.mark.parametrize("mlp", ["model's", "none"])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", BLOCKS.names())
def test_token_by_token_is_the_whole_span(name: str, mixer: str, mlp: str) -> None:
    block, params = made(name, mixer, mlp)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, TIME, WIDTH)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(TIME, dtype=jnp.int32), (ROWS, TIME))
    ones = jnp.ones((ROWS, TIME), jnp.int32)
    whole = block.apply({"params": params}, x, ones, positions, None)[0]
    assert whole.shape == x.shape
    state = block.mixer.init_state(ROWS, TIME)
    step = jax.jit(lambda *args: block.apply({"params": params}, *args, method="step"))
    # The first token begins the document, like a prefill of one token.
    prefill = block.apply({"params": params}, x[:, :1], ones[:, :1], positions[:, :1], state)
    out, state = prefill[:2]
    outs = [out[:, 0]]
    for t in range(1, TIME):
        out, state = step(x[:, t], positions[:, t], state)
        outs.append(out)
    np.testing.assert_allclose(jnp.stack(outs, axis=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS.names())
def test_every_parameter_learns(name: str) -> None:
    block, params = made(name, "softmax", "model's")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, TIME, WIDTH)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(TIME, dtype=jnp.int32), (ROWS, TIME))
    ones = jnp.ones((ROWS, TIME), jnp.int32)
    loss = lambda p: jnp.sum(jnp.sin(block.apply({"params": p}, x, ones, positions, None)[0]))
    for leaf in jax.tree.leaves(jax.grad(loss)(params)):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)
