"""What every kind of matrix in lm/matrices must do."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import params as params_lib
from lm.families import MATRICES
from lm.modules.linear import Matrix
from tests.lm import tiny

SHAPES = [("D F", (32, 48), 1), ("D H K", (32, 4, 8), 1), ("H V D", (4, 8, 32), 2)]


def made(name: str, letters: str, shape: tuple[int, ...], contracted: int, **mesh: int) -> Matrix:
    changes = {f"mesh.{axis}": ways for axis, ways in mesh.items()}
    context = tiny.create({"mesh.data": 1} | changes, math.prod(mesh.values())).model.context
    options = MATRICES.choose(name, "matrix").options
    return MATRICES.find(name, "matrix")(context, letters, shape, contracted, **options)


def initialized(matrix: Matrix, x: jax.Array) -> tuple[Any, Any]:
    return params_lib.split(matrix.init(jax.random.key(0), x)["params"])


def inputs(shape: tuple[int, ...], contracted: int) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((2, 3, *shape[:contracted])), jnp.float32)


def summed(matrix: Matrix, params: Any, x: jax.Array) -> jax.Array:
    out: Any = matrix.apply({"params": params}, x)
    return jnp.sum(jnp.sin(out))


@pytest.mark.parametrize(("letters", "shape", "contracted"), SHAPES)
@pytest.mark.parametrize("name", MATRICES.names())
def test_it_multiplies_by_the_sum_of_its_products(
    name: str, letters: str, shape: tuple[int, ...], contracted: int
) -> None:
    matrix, x = made(name, letters, shape, contracted), inputs(shape, contracted)
    params, infos = initialized(matrix, x)
    for info in jax.tree.leaves(infos, is_leaf=params_lib.is_info):
        assert len(info.letters.split()) == len(info.shape)
        assert info.role == "hidden", "muP scales the rate of matrices between activations"
    chains: Any = matrix.apply({"params": params}, method="chains")
    whole = np.zeros(shape)
    for chain in chains:
        product: Any = np.eye(math.prod(shape[:contracted]))
        for factor in chain:
            rows = math.prod(factor.array.shape[: factor.contracted])
            product = product @ np.asarray(factor.array, np.float64).reshape(rows, -1)
        whole += product.reshape(shape)
    expected = np.tensordot(np.asarray(x, np.float64), whole, contracted)
    got: Any = matrix.apply({"params": params}, x)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    grads = jax.grad(lambda p: summed(matrix, p, x))(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)


@pytest.mark.parametrize("name", MATRICES.names())
def test_devices_that_share_it_compute_the_same(name: str) -> None:
    letters, shape, contracted = SHAPES[0]
    alone, x = made(name, letters, shape, contracted), inputs(shape, contracted)
    params, _ = initialized(alone, x)
    shared = made(name, letters, shape, contracted, fsdp=2, tensor=2)

    def value_and_gradient(matrix: Matrix) -> Any:
        loss = lambda p, x: summed(matrix, p, x)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    for a, b in zip(
        jax.tree.leaves(value_and_gradient(shared)),
        jax.tree.leaves(value_and_gradient(alone)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
