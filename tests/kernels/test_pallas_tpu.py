"""Pallas kernels on a simulated TPU: memory that was never written reads as NaN, and accesses that
race are found. One small case of each op and setting, forward and backward.

To add one: a line in `SMALL`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import contract, dispatch
from kernels.blocks import Attention, PallasChunk
from kernels.contract import Case
from kernels.primitives import device
from tests.kernels.contract_problem import assert_close, merge, split, tolerance

# Two cores take programs that are parallel in turns.
SIMULATOR = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
)


class Small(NamedTuple):
    """A case of an op, and tiles so small that it has several."""

    name: str
    case: Case
    blocks: Any


def in_chunks(name: str, options: dict[str, Any]) -> Small:
    """Two rows and two chunks of a recurrence; documents, padding, a state, a ragged end."""
    dims = {"B": 2, "T": 24, "H": 1, "K": 16, "V": 8}
    return Small(name, Case(dims, options, "padded", carried=True), PallasChunk(16, 1))


def sticks(time: int, groups: int) -> Small:
    """Stick-breaking over two blocks of keys or more, which may stop before the last."""
    dims = {"B": 1, "T": time, "H": 2, "G": groups, "K": 8, "V": 8}
    options = {"remainder": "value", "tolerance": 1e-9}
    return Small("stickbreaking", Case(dims, options, "padded"), Attention(128, 128, 128))


SMALL = (
    sticks(200, 1),
    sticks(300, 2),
    in_chunks("gated_linear", {"decay": "scalar"}),
    in_chunks("delta_rule", {}),
    in_chunks("gated_linear", {}),
    in_chunks("gated_linear", {"decay": "vector"}),
    in_chunks("delta_rule", {"decay": "scalar"}),
)


def answer(small: Small, form: str, blocks: Any) -> Any:
    """Output, state, and cotangents of all inputs and of the state."""
    problem = contract.sample(dispatch.get(small.name), small.case)

    def run(inputs: Any, floats: Any) -> Any:
        out, state = dispatch.apply(
            small.name,
            inputs,
            segment_ids=problem.segment_ids,
            state=merge(floats, problem.state),
            form=form,
            options=small.case.options,
            blocks=blocks,
        )
        return out, split(state)

    primals = problem.inputs, split(problem.state)
    found, pull = jax.vjp(run, *primals)
    return found, pull(jax.tree.map(jnp.cos, found))


@pytest.mark.slow
@pytest.mark.parametrize("small", SMALL, ids=lambda small: f"{small.name}-{small.case.name}")
def test_simulated(small: Small):
    with device.interpreted(SIMULATOR):
        got = jax.block_until_ready(answer(small, "pallas_tpu", small.blocks))
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found
    want = answer(small, "reference", None)
    assert_close(got, want, tolerance(small.name, "pallas_tpu"), small.name)


def test_the_simulator_sees_what_was_not_written():
    """A kernel that adds to its output without having set it."""

    def add(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] += x_ref[...]

    x = jnp.ones((8, 128))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    out = pl.pallas_call(add, out_shape=shape, interpret=SIMULATOR)(x)
    assert bool(jnp.all(jnp.isnan(out)))
