"""Problems, tolerances and properties of softmax attention.

The fast cases are chosen so that every two settings of T, groups, widths, documents, carried state
and options meet somewhere; the product of all of them is slow.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Case, Property, Run, Tolerance
from kernels.primitives import attention
from kernels.primitives.attention import dims, wave

_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 17},
    {"alibi": True},
    {"logits_soft_cap": 3.0},
    {"window": 64, "alibi": True, "logits_soft_cap": 3.0, "scale": 0.5},
)

FAST = (
    Case(dims(257, 2, 17, 17), {}, "none", tag="fast"),
    Case(dims(257, 1, 16, 9), {"window": 100}, "padded", tag="fast"),
    Case(dims(64, 4, 17, 9), {"alibi": True}, "padded", carried=True, tag="fast"),
    Case(dims(65, 2, 7, 16), {"logits_soft_cap": 3.0}, "packed", tag="fast"),
    Case(dims(63, 1, 16, 16), {"window": 17}, "none", carried=True, tag="fast"),
    Case(dims(1, 4, 16, 16), {"alibi": True, "window": 8}, "none", carried=True, tag="fast"),
    Case(dims(65, 4, 16, 16), {"scale": 0.5}, "packed", dtype="bfloat16", tag="fast"),
    Case(dims(64, 1, 16, 16), {}, "padded", gain=300.0, tag="fast"),
)

CASES = FAST + attention.every_case(_OPTIONS) + attention.BENCH

_ROUNDING = "the same float32 sums in another order"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; inside all is float32"

TOLERANCES = {
    ("reference", "float32"): Tolerance(1e-5, _ROUNDING),
    ("reference", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("chunked", "float32"): Tolerance(1e-5, _ROUNDING),
    ("chunked", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("jax_nn", "float32"): Tolerance(1e-5, _ROUNDING),
    ("jax_nn", "bfloat16"): Tolerance(2e-2, "weights are rounded to bfloat16 before the values"),
}


def _weights_sum_to_one(run: Run) -> tuple[Array, Array]:
    inputs = wave(70) | {"v": jnp.ones((1, 70, 1, 8))}
    return run(inputs, {"window": 20}), inputs["v"]


def _wide_window_is_full(run: Run) -> tuple[Array, Array]:
    return run(wave(70), {"window": 70}), run(wave(70), {})


def _window_of_one_copies(run: Run) -> tuple[Array, Array]:
    return run(wave(70), {"window": 1}), wave(70)["v"]


def _zero_logits_average(run: Run) -> tuple[Array, Array]:
    inputs = wave(70)
    count = jnp.arange(1, 71, dtype=jnp.float32)[:, None, None]
    mean = jnp.cumsum(inputs["v"], axis=1) / count
    return run(inputs | {"q": jnp.zeros_like(inputs["q"])}, {}), mean


PROPERTIES = (
    Property("weights_sum_to_one", _weights_sum_to_one),
    Property("window_of_T_is_full", _wide_window_is_full),
    Property("window_of_1_copies_v", _window_of_one_copies),
    Property("zero_logits_average", _zero_logits_average),
)
