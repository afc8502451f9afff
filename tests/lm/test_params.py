"""Declarations go with parameters through init and scan, then are split off as a static tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from lm import params
from lm.params import ParamInfo


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        init = params.declare(nn.initializers.ones, "D F", "hidden", True)
        return x @ self.param("w", init, (4, 4)), None


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = params.declare(nn.initializers.zeros, "D", "vector", False)
        x = x + self.param("bias", init, (4,))
        scan = nn.scan(
            Inner,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={meta.PARTITION_NAME: "L"},
        )
        return scan(name="layers")(x, None)[0]


def boxed() -> Any:
    return jax.eval_shape(lambda: Outer().init(jax.random.key(0), jnp.zeros((2, 4))))["params"]


def test_split_gives_arrays_and_a_static_tree() -> None:
    values, infos = params.split(boxed())
    assert infos == {
        "bias": ParamInfo("D", (4,), "vector", False),
        "layers": {"w": ParamInfo("L D F", (3, 4, 4), "hidden", True)},
    }
    assert jax.tree.map(lambda x: x.shape, values, is_leaf=lambda x: hasattr(x, "dtype")) == {
        "bias": (4,),
        "layers": {"w": (3, 4, 4)},
    }


def test_unboxed_values_apply() -> None:
    values = {"bias": jnp.ones(4), "layers": {"w": jnp.stack([2 * jnp.eye(4)] * 3)}}
    out: Any = Outer().apply({"params": values}, jnp.zeros((2, 4)))
    assert np.array_equal(out, np.full((2, 4), 8.0))


def test_letters_must_name_every_dimension() -> None:
    init = params.declare(nn.initializers.ones, "D", "hidden", True)
    with pytest.raises(AssertionError, match="must name the 2 dimensions"):
        init(jax.random.key(0), (2, 3))


def test_add_axis_and_remove_axis_are_inverse() -> None:
    box = params.Declared(jnp.zeros((2, 3)), "D F", "hidden", True)
    grown = box.add_axis(1, {meta.PARTITION_NAME: "L"})
    assert grown.letters == "D L F"
    assert grown.remove_axis(1, {meta.PARTITION_NAME: "L"}).letters == "D F"
    with pytest.raises(AssertionError):
        grown.remove_axis(0, {meta.PARTITION_NAME: "L"})


def test_names_count_and_table() -> None:
    _, infos = params.split(boxed())
    assert params.names(infos) == {"bias": "bias", "layers": {"w": "layers/w"}}
    assert params.count(infos) == {"vector": 4, "hidden": 48, "total": 52}
    lines = [line.split() for line in params.table(infos).splitlines()]
    assert lines[0] == ["name", "letters", "shape", "role", "decay", "size"]
    assert ["layers/w", "L", "D", "F", "3x4x4", "hidden", "yes", "48"] in lines
    assert ["bias", "D", "4", "vector", "no", "4"] in lines
    assert lines[-1] == ["total", "total", "52"]


def test_a_parameter_that_was_not_declared_is_named() -> None:
    boxed = {"mixer": {"decay": jnp.zeros(3)}}
    with pytest.raises(TypeError, match=r"parameter mixer/decay: wrap .* lm\.params\.declare"):
        params.split(boxed)
