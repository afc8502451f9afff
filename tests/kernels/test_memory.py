"""No op keeps T x T elements. This is read from the compiled gradient at T = 2048."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case
from tests.kernels.contract_problem import QUICK

TIME, HEADS = 2048, 2


def largest_buffer(name: str, form: str) -> tuple[int, int]:
    """Elements of the largest array in the compiled gradient, and bytes of temporaries."""
    case = Case({"B": 1, "T": TIME, "H": HEADS, "G": HEADS, "K": 16, "V": 16, "N": 4, "W": 4})
    inputs = contract.sample(dispatch.get(name), case).inputs

    def loss(inputs: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(dispatch.apply(name, inputs, form=form)[0])

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    compiled = gradient.lower(inputs).compile()
    text = compiled.as_text()
    assert text is not None
    shapes = re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)
    elements = [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]
    memory = compiled.memory_analysis()
    assert memory is not None
    return max(elements), memory.temp_size_in_bytes


@pytest.mark.parametrize("name", dispatch.names())
def test_no_array_of_every_pair(name: str):
    elements, temporaries = largest_buffer(name, "chunked")
    assert elements < TIME * TIME // 4
    assert temporaries < 4 * TIME * TIME


def test_the_test_sees_such_an_array():
    elements, _ = largest_buffer("softmax", "reference")
    assert elements >= HEADS * TIME * TIME
