"""Problems, tolerances and properties of softmax attention.

The fast cases are chosen so that any two settings of T, groups, widths, documents, carried state
and options occur together in some case; the slow ones thin their product (`contract.thinned`).
"""

from itertools import product
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Case, Property, Run, Tolerance, extremes
from kernels.primitives import attention, rope
from kernels.primitives.attention import dims, near, wave

_CAPPED = {"logits_soft_cap": 3.0, "sink": True}
_INFINITE = {"global_tokens": 3, "rope_theta": 100.0}
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 17},
    {"alibi": True, "block": 20},
    _CAPPED,
    {"window": 64, "alibi": True, "logits_soft_cap": 3.0, "scale": 0.5, "global_tokens": 5},
)

FAST = (
    Case(dims(257, 2, 17, 17), {}, "none", tag="fast"),
    Case(
        dims(257, 1, 16, 9),
        {"window": 30, "distance_ceiling": 20} | _INFINITE,
        "padded",
        tag="fast",
    ),
    Case(dims(64, 4, 17, 9), {"alibi": True, "block": 20}, "padded", carried=True, tag="fast"),
    Case(dims(65, 2, 7, 16), _CAPPED, "packed", tag="fast"),
    Case(
        dims(63, 1, 16, 16),
        {"window": 17, "distance_ceiling": 17, "sink": True} | _INFINITE,
        "none",
        carried=True,
        tag="fast",
    ),
    Case(dims(1, 4, 16, 16), {"alibi": True, "window": 8}, "none", carried=True, tag="fast"),
    Case(
        dims(65, 4, 16, 16),
        {"scale": 0.5, "window": 9, "global_tokens": 2, "logits_soft_cap": 3.0},
        "packed",
        dtype="bfloat16",
        tag="fast",
    ),
    Case(dims(64, 1, 16, 16), {"block": 24}, "padded", gain=300.0, tag="fast"),
)

# Rotations need an even K, which `every_case` does not have.
_TURNED = tuple(
    Case(
        dims(time, groups, 16, 9),
        {"window": window, "distance_ceiling": 9} | _INFINITE,
        "padded" if carried else "none",
        carried,
    )
    for time, groups, window, carried in product((1, 65, 257), (4, 2), (9, 40), (False, True))
)

# The cap is reached everywhere, or all logits are far from 0. (Where one key leaves less than a
# rounding to the others, the gradient of its logit is a difference of equals: see the README.)
_REACHED = (24.0,), (-24.0,), (12.0, -24.0)
EXTREME = (
    *extremes(
        Case(dims(257, 2, 17, 17), tag="fast"),
        near("q", 30.0),
        near("q", -30.0),
        near("q", 30.0, -30.0),
    ),
    *extremes(
        Case(dims(65, 2, 7, 16), _CAPPED, "packed", tag="fast"),
        *(near("q", *z)._replace(beyond=("pallas_tpu",)) for z in _REACHED),
    ),
)

CASES = FAST + EXTREME + attention.every_case(_OPTIONS) + _TURNED + attention.BENCH

_ROUNDING = "the same float32 sums in another order"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; all else is float32"

TOLERANCES = {
    ("reference", "float32"): Tolerance(1e-5, _ROUNDING),
    ("reference", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("chunked", "float32"): Tolerance(1e-5, _ROUNDING),
    ("chunked", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("jax_nn", "float32"): Tolerance(1e-5, _ROUNDING),
    ("jax_nn", "bfloat16"): Tolerance(2e-2, "weights are rounded to bfloat16 before the values"),
    ("pallas_tpu", "float32"): Tolerance(1e-5, _ROUNDING),
    ("pallas_tpu", "bfloat16"): Tolerance(
        2e-2, "a TPU rounds weights before the values, and the library rounds its sums for a sink"
    ),
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


def _short_texts_are_rotated(run: Run) -> tuple[Array, Array]:
    inputs, positions = wave(70), jnp.arange(70)[None]
    turned = {name: rope.rotate(inputs[name], positions, theta=50.0) for name in "qk"}
    options = {"window": 70, "global_tokens": 4, "distance_ceiling": 70, "rope_theta": 50.0}
    return run(inputs, options), run(inputs | turned, {})


def _distance_is_bounded(run: Run) -> tuple[Array, Array]:
    """All tokens are equal: a query beyond the window weighs key 0 the same, wherever it is."""
    ones = jnp.ones((1, 70, 1, 8))
    inputs = {"q": ones, "k": ones, "v": jnp.eye(70)[None, :, None]}
    options = {"window": 8, "global_tokens": 1, "distance_ceiling": 8, "rope_theta": 50.0}
    given = run(inputs, options)[0, 8:, 0, 0]
    return given, jnp.broadcast_to(given[0], given.shape)


def _block_of_all_is_full(run: Run) -> tuple[Array, Array]:
    return run(wave(70), {"block": 70}), run(wave(70), {})


def _sinks_of_nothing(run: Run) -> tuple[Array, Array]:
    return run(wave(70) | {"sink": jnp.array([-1e30])}, {"sink": True}), run(wave(70), {})


def _sinks_take_a_share(run: Run) -> tuple[Array, Array]:
    """Zero logits: n keys beside a sink of e^s keep a share of n / (n + e^s)."""
    inputs = wave(70) | {"v": jnp.ones((1, 70, 1, 8)), "sink": jnp.array([2.0])}
    count = jnp.arange(1, 71, dtype=jnp.float32)[:, None, None]
    kept = jnp.broadcast_to(count / (count + jnp.exp(2.0)), (1, 70, 1, 8))
    return run(inputs | {"q": jnp.zeros_like(inputs["q"])}, {"sink": True}), kept


PROPERTIES = (
    Property("weights_sum_to_one", _weights_sum_to_one),
    Property("window_of_T_is_full", _wide_window_is_full),
    Property("window_of_1_copies_v", _window_of_one_copies),
    Property("zero_logits_average", _zero_logits_average),
    Property("texts_within_the_window_are_rotated_alone", _short_texts_are_rotated),
    Property("beyond_the_window_distance_is_bounded", _distance_is_bounded),
    Property("block_of_T_is_full", _block_of_all_is_full),
    Property("a_sink_of_minus_infinity_is_none", _sinks_of_nothing),
    Property("a_sink_takes_its_share", _sinks_take_a_share),
)
