"""Norms, gates and the feed-forward's product keep only their inputs for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lm.feed_forward.swiglu import Swiglu
from lm.modules.norm import RMSNorm, unit_keys
from lm.modules.norm_gate import NormGate
from tests.lm import tiny

SHAPE = (2, 16, 4, 32)


def kept(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The arrays that the backward pass gets and that are as large as the activations."""
    backward = lambda *args: jax.tree.leaves(jax.vjp(function, *args)[1])
    found: dict[int, Any] = {id(x): x.aval for x in jax.make_jaxpr(backward)(*args).jaxpr.outvars}
    return [x for x in found.values() if x.size >= args[-1].size]


def modules() -> dict[str, tuple[nn.Module, int]]:
    """Modules, and how many arrays as large as activations each keeps.

    The feed-forward keeps five: its input twice, once for each of two products (a compiler makes
    one array of them), its two halves, and their product.
    """
    context = tiny.create({"model.precision": "bfloat16"}).model.context
    return {
        "norm": (RMSNorm(context), 1),
        "gate": (NormGate(context), 2),
        "gate before": (NormGate(context, over="heads", gate_is="before"), 2),
        "mlp": (Swiglu(context, 32, 32), 5),
    }


@pytest.mark.parametrize("name", ["norm", "gate", "gate before", "mlp"])
def test_only_inputs_are_kept(name: str) -> None:
    module, count = modules()[name]
    x = jnp.ones(SHAPE, jnp.bfloat16)
    inputs = (x, x) if "gate" in name else (x,)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
    found = kept(module.apply, params, *inputs)
    assert [x.dtype for x in found] == [jnp.bfloat16] * count


def test_unit_keys_keep_only_their_input() -> None:
    found = kept(lambda heads: unit_keys(heads, 8), jnp.ones(SHAPE, jnp.bfloat16))
    assert [x.dtype for x in found] == [jnp.bfloat16]
