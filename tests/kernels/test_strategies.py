"""What each strategy of a split time axis asks of its own: heads that are exchanged, and maps of a
state that do not forget. What all of them share is in test_time_axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import contract, dispatch
from kernels.shard import Placement
from tests.kernels.contract_problem import QUICK, a_case, sizes

TIME = 40


def placement(ranks: int, strategy: str) -> Placement:
    mesh = jax.make_mesh((ranks,), ("sequence",), axis_types=(AxisType.Auto,))
    return Placement(mesh, {"T": ("sequence",)}, strategy, "contiguous")


def assert_split_equals_whole(name: str, inputs: Any, options: Any, place: Placement) -> None:
    """Of a loss and all its gradients, relative to the largest of each."""

    def value(inputs: Any, place: Placement | None) -> jax.Array:
        given = {"form": "chunked", "options": options, "placement": place}
        return jnp.sum(jnp.sin(3.0 * dispatch.apply(name, inputs, **given)[0]))

    got, want = (
        jax.jit(jax.value_and_grad(lambda x, to=to: value(x, to)), compiler_options=QUICK)(inputs)
        for to in (place, None)
    )
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("heads", "groups", "told"),
    [
        (12, 4, r"all_to_all: H=12 heads must be a multiple of 8 ranks"),
        (24, 12, r"all_to_all: G=12 heads must be a multiple of 8 ranks, or divide them"),
    ],
)
def test_heads_that_cannot_be_exchanged(heads: int, groups: int, told: str):
    case = a_case(TIME, dims=sizes(TIME) | {"H": heads, "G": groups})
    problem = contract.sample(dispatch.get("softmax"), case)
    place = placement(8, "all_to_all")
    with pytest.raises(ValueError, match=told):
        dispatch.apply("softmax", problem.inputs, form="chunked", placement=place)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_key_value_heads_are_exchanged(groups: int):
    """Fewer than ranks, which are copied, as many, and more; four ranks."""
    case = a_case(TIME, dims=sizes(TIME) | {"H": 8, "G": groups})
    inputs = contract.sample(dispatch.get("softmax"), case).inputs
    assert_split_equals_whole("softmax", inputs, {}, placement(4, "all_to_all"))


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_a_map_of_the_memory_that_is_near_the_unit_matrix(decay: str):
    """Where tokens write little, what entered a rank is read by all after it: a wrong map would
    show, as it does not where the memory has forgotten.
    """
    options = {"decay": decay}
    problem = contract.sample(dispatch.get("delta_rule"), a_case(TIME, options=options))
    inputs = dict(problem.inputs, beta=0.02 * problem.inputs["beta"])
    if decay == "scalar":
        inputs["log_decay"] = 0.02 * inputs["log_decay"]

    assert_split_equals_whole("delta_rule", inputs, options, placement(8, "states"))
