"""Diagonal recurrences beyond the contract suite: padding between tokens, extreme gates, many
turns.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case
from kernels.linear_scan import tile
from tests.kernels.contract_problem import answer, assert_close

GATE = {"transition": "gate"}


@pytest.mark.parametrize(("options", "modes"), [({}, 3), (GATE, 1)], ids=str)
def test_padding_anywhere(options: dict[str, str], modes: int):
    """Padding inside documents, between the state and its first token, and at a chunk's end."""
    case = Case({"B": 2, "T": 150, "H": 2, "K": 3, "N": modes}, options, carried=True)
    problem = contract.sample(dispatch.get("linear_scan"), case)
    random = np.random.default_rng(5)
    for share in (0.1, 0.9):
        ids = 2 + np.cumsum(random.random((2, 150)) < 0.03, axis=1)
        ids = jnp.asarray(np.where(random.random((2, 150)) < share, 0, ids), jnp.int32)
        packed = problem._replace(segment_ids=ids)
        want, got = (answer("linear_scan", form, case, packed) for form in ("reference", "chunked"))
        assert_close(got, want, 1e-5, f"padding {share}")


@pytest.mark.parametrize("level", [0.0, -50.0, -1e4])
def test_extreme_gates(level: float):
    """Decay of nothing or of everything at once is finite, and equals the reference."""
    case = Case({"B": 2, "T": 150, "H": 2, "K": 3, "N": 1}, GATE)
    problem = contract.sample(dispatch.get("linear_scan"), case)
    decay = jnp.full_like(problem.inputs["log_decay"], level)
    problem = problem._replace(inputs=problem.inputs | {"log_decay": decay})
    want, got = (answer("linear_scan", form, case, problem) for form in ("reference", "chunked"))
    assert_close(got, want, 1e-5, f"log_decay {level}")


def test_powers_of_many_turns():
    """Angles of many turns, like S4D's fastest modes, are within a few roundings of float64."""
    random = np.random.default_rng(0)
    angle = random.uniform(-30.0, 30.0, (4, 9)).astype(np.float32)
    magnitude = -random.uniform(0.0, 0.05, (4, 9)).astype(np.float32)
    re, im = tile.powers(jnp.arange(129), 128, jnp.asarray(magnitude), jnp.asarray(angle))
    lag = np.arange(129.0)[:, None, None]
    want = np.exp(lag * (magnitude.astype(np.float64) + 1j * angle.astype(np.float64)))
    assert np.abs(np.asarray(re) + 1j * np.asarray(im) - want).max() < 2e-6
