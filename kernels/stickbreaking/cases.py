"""Problems, tolerances and properties of stick-breaking attention.

The fast cases are chosen so that any two settings of T, groups, widths, documents, carried state
and options occur together in some case; the slow ones thin their product (`contract.thinned`).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Case, Property, Run, Tolerance, extremes
from kernels.primitives import attention
from kernels.primitives.attention import dims, near, wave

_BIAS = {"remainder": "bias"}
_VALUE = {"remainder": "value"}
_CURRENT = {"attend_current": True}
_EXACT = {"tolerance": 1e-9}  # takes the code path with a tolerance; the error is below rounding
_OPTIONS: tuple[dict[str, Any], ...] = ({}, _CURRENT, _BIAS, _VALUE, _VALUE | _CURRENT)

FAST = (
    Case(dims(257, 2, 17, 17), {}, "none", tag="fast"),
    Case(dims(257, 1, 16, 9), _BIAS | _CURRENT | _EXACT, "padded", tag="fast"),
    Case(dims(64, 4, 17, 9), _VALUE, "padded", carried=True, tag="fast"),
    Case(dims(65, 2, 7, 16), _CURRENT | {"scale": 0.5}, "packed", tag="fast"),
    Case(dims(63, 1, 16, 16), _BIAS, "none", carried=True, tag="fast"),
    Case(dims(1, 4, 16, 16), _VALUE | _CURRENT, "none", carried=True, tag="fast"),
    Case(dims(65, 4, 16, 16), _VALUE, "packed", dtype="bfloat16", tag="fast"),
    Case(dims(64, 1, 16, 16), _BIAS, "padded", gain=300.0, tag="fast"),
)

# Every key takes all that is left, or almost nothing, whatever the query; or they alternate.
_SURE = near("k", 16.0), near("k", 30.0), near("k", -20.0), near("k", 30.0, -30.0)
EXTREME = (
    *extremes(Case(dims(257, 2, 17, 17), tag="fast"), *_SURE),
    *extremes(Case(dims(64, 4, 17, 9), _VALUE, "padded", carried=True, tag="fast"), *_SURE),
    *extremes(
        Case(dims(1, 4, 16, 16), _VALUE | _CURRENT, "none", carried=True, tag="fast"),
        near("k", 30.0),
        near("k", -30.0),
    ),
    *extremes(Case(dims(65, 4, 16, 16), _VALUE, "packed", dtype="bfloat16"), near("k", 12.0)),
)

CASES = FAST + EXTREME + attention.every_case(_OPTIONS) + attention.BENCH

_ROUNDING = "the same float32 sums in another order"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; all else is float32"
_OPERANDS = "outputs and operands (weights, cotangents of logits) are rounded to bfloat16"

TOLERANCES = {
    ("reference", "float32"): Tolerance(1e-5, _ROUNDING),
    ("reference", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("chunked", "float32"): Tolerance(1e-5, _ROUNDING),
    ("chunked", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("pallas_tpu", "float32"): Tolerance(1e-5, _ROUNDING),
    ("pallas_tpu", "bfloat16"): Tolerance(5e-3, _OPERANDS),
    ("triton_gpu", "float32"): Tolerance(1e-5, _ROUNDING),
    ("triton_gpu", "bfloat16"): Tolerance(5e-3, _OPERANDS),
}


def _identity(time: int) -> Array:
    return jnp.eye(time)[None, :, None]


def _stick_is_used_up(run: Run) -> tuple[Array, Array]:
    """Weights and remainder sum to one: if all values are one, so is the output."""
    inputs = wave(70) | {"v": jnp.ones((1, 70, 1, 8))}
    return run(inputs, _VALUE), inputs["v"]


def _zero_logits_halve(run: Run) -> tuple[Array, Array]:
    """beta = 1/2 everywhere: the key n steps back takes 2^-n."""
    inputs = wave(70)
    distance = jnp.arange(70)[:, None] - jnp.arange(70)
    halves = jnp.where(distance > 0, 2.0 ** -distance.astype(jnp.float32), 0.0)
    run_inputs = {"q": jnp.zeros_like(inputs["q"]), "k": inputs["k"], "v": _identity(70)}
    return run(run_inputs, {}), halves[None, :, None]


def _eager_keys_copy(run: Run) -> tuple[Array, Array]:
    """beta = 1: the nearest key takes the whole stick."""
    inputs = wave(70)
    ones = jnp.ones_like(inputs["q"])
    previous = jnp.pad(inputs["v"][:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
    return run({"q": 1e3 * ones, "k": ones, "v": inputs["v"]}, {}), previous


def _shy_keys_leave_all(run: Run) -> tuple[Array, Array]:
    """beta = 0: nothing is taken, and the remainder is the whole stick."""
    inputs = wave(70)
    ones = jnp.ones_like(inputs["q"])
    return run({"q": -1e3 * ones, "k": ones, "v": inputs["v"]}, _VALUE), inputs["v"]


PROPERTIES = (
    Property("weights_and_remainder_sum_to_one", _stick_is_used_up),
    Property("zero_logits_halve_the_stick", _zero_logits_halve),
    Property("certain_keys_copy_the_previous_value", _eager_keys_copy),
    Property("rejected_keys_leave_the_stick_whole", _shy_keys_leave_all),
)
