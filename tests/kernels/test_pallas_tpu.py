"""Pallas kernels on a simulated TPU.

The simulator reads NaN where memory was never written, and finds racing accesses. Each op and
setting has one small case, forward and backward. To add a case, add a line to `SMALL`.
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

# Two simulated cores take the parallel programs in turn.
SIMULATOR = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
)


class Small(NamedTuple):
    """A case of an op, with tiles small enough that it needs several."""

    name: str
    case: Case
    blocks: Any


def in_chunks(name: str, options: dict[str, Any]) -> Small:
    """Two rows and two chunks of a recurrence, with documents, padding, a state and a partial last
    chunk.
    """
    dims = {"B": 2, "T": 24, "H": 1, "K": 16, "V": 8}
    return Small(name, Case(dims, options, "padded", carried=True), PallasChunk(16, 1))


def sticks(time: int, groups: int) -> Small:
    """Stick-breaking over two or more blocks of keys; it may stop before the last block."""
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
    """The output, the state, and the cotangents of all inputs and of the state."""
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
    """This kernel adds to its output without setting it first."""

    def add(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] += x_ref[...]

    x = jnp.ones((8, 128))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    out = pl.pallas_call(add, out_shape=shape, interpret=SIMULATOR)(x)
    assert bool(jnp.all(jnp.isnan(out)))
