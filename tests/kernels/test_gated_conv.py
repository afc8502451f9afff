"""The causal convolution beyond the contract suite: padding between tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case
from tests.kernels.contract_problem import QUICK, answer, assert_close, error, tolerance

GAPS = [
    [[1, 0, 1, 1, 0, 0, 0, 1, 2, 0, 2, 3, 0], [0, 0, 4, 4, 0, 4, 0, 0, 5, 5, 5, 0, 0]],
    [[2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2], [0] * 13],
    [[0, 0, 3, 3, 0, 3, 4, 0, 0, 4, 4, 5, 5], [0, 2, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2]],
]


@pytest.mark.parametrize("taps", [1, 4, 20])
def test_taps_reach_over_padding(taps: int):
    """Padding inside documents and between the state and its first token equals the reference."""
    options = {"bias": True, "gate": True}
    case = Case({"B": 2, "T": 13, "H": 2, "K": 3, "W": taps}, options, carried=True)
    problem = contract.sample(dispatch.get("gated_conv"), case)
    for ids in GAPS:
        packed = problem._replace(segment_ids=jnp.asarray(ids, jnp.int32))
        want, got = (answer("gated_conv", form, case, packed) for form in ("reference", "chunked"))
        assert_close(got, want, 1e-5, str(ids))


def test_padding_changes_nothing():
    """A row with padding inserted gives the same outputs and state as the row without."""
    case = Case({"B": 1, "T": 40, "H": 2, "K": 3, "W": 7})
    inputs = contract.sample(dispatch.get("gated_conv"), case).inputs
    place = np.sort(np.random.default_rng(0).choice(60, 40, replace=False))
    ids = jnp.zeros((1, 60), jnp.int32).at[0, place].set(1)
    strewn = inputs | {"x": jnp.full((1, 60, 2, 3), 1e9).at[:, place].set(inputs["x"])}
    run = jax.jit(
        lambda inputs, ids: dispatch.apply("gated_conv", inputs, segment_ids=ids, form="chunked"),
        compiler_options=QUICK,
    )
    out, state = run(inputs, None)
    got, end = run(strewn, ids)
    assert error(got[:, place], out) <= tolerance("gated_conv", "chunked")
    np.testing.assert_array_equal(end.tail, state.tail)
