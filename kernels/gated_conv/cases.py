"""Problems, tolerances and properties of the causal convolution.

The fast cases are chosen so that any two settings of T, taps, widths, documents, carried state and
options occur together in some case; the slow cases thin their product (`contract.thinned`).
"""

import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Case, Property, Run, Tolerance, extremes, thinned
from kernels.letters import Inputs
from kernels.primitives.chunks import dims, near

_BIAS = {"bias": True}
_GATE = {"gate": True}

FAST = (
    Case(dims(257, 17, 17, W=4), _BIAS | _GATE, "packed", tag="fast"),
    Case(dims(65, 16, 16, W=64), {}, "padded", carried=True, tag="fast"),
    Case(dims(64, 9, 9, W=3), _BIAS, "none", carried=True, tag="fast"),
    Case(dims(65, 16, 16, W=1), _GATE, "packed", carried=True, tag="fast"),
    Case(dims(63, 7, 7, W=70), _BIAS | _GATE, "none", tag="fast"),
    Case(dims(1, 16, 16, W=4), _BIAS | _GATE, "none", carried=True, tag="fast"),
    Case(dims(65, 16, 16, W=4), _BIAS, "padded", dtype="bfloat16", tag="fast"),
    Case(dims(64, 17, 17, W=2), {}, "none", tag="fast"),
)

EXTREME = extremes(
    Case(dims(257, 17, 17, W=4), _BIAS | _GATE, "packed", tag="fast"),
    near("gate", 1e-6),
    near("gate", 1e4),
)

SLOW = tuple(
    Case(dims(time, 17, 17, W=taps), options, documents, carried)
    for time, taps, options, documents, carried in thinned(
        (1, 63, 64, 65, 257),
        (1, 4, 64),
        ({}, _BIAS, _GATE, _BIAS | _GATE),
        ("none", "packed", "padded"),
        (False, True),
    )
)

BENCH = tuple(
    Case({"B": 4, "T": 2048, "H": 4, "K": 64, "W": taps}, options, tag="bench")
    for taps, options in ((4, {}), (4, _BIAS | _GATE), (64, {}))
)

CASES = FAST + EXTREME + SLOW + BENCH

_ROUNDING = "the same float32 sums in another order"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; all else is float32"

TOLERANCES = {
    ("reference", "float32"): Tolerance(1e-5, _ROUNDING),
    ("reference", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("chunked", "float32"): Tolerance(1e-5, _ROUNDING),
    ("chunked", "bfloat16"): Tolerance(5e-3, _OUTPUT),
}


def wave(time: int, taps: int, width: int = 8) -> Inputs:
    """Inputs of one head without randomness."""
    x = jnp.sin(jnp.arange(time * width, dtype=jnp.float32) ** 1.5).reshape(1, time, 1, width)
    weight = jnp.cos(jnp.arange(width * taps, dtype=jnp.float32) ** 1.5).reshape(1, width, taps)
    return {"x": x, "weight": weight}


def _impulse_shows_the_taps(run: Run) -> tuple[Array, Array]:
    """The response to an impulse is the weight, last tap first, and then zeros."""
    inputs = wave(70, 9)
    impulse = jnp.zeros_like(inputs["x"]).at[:, 0].set(1.0)
    answer = jnp.moveaxis(inputs["weight"][..., ::-1], -1, 1)
    want = jnp.pad(answer, ((0, 0), (0, 61), (0, 0)))[:, :, None]
    return run(inputs | {"x": impulse}, {}), want


def _tap_before_last_shifts(run: Run) -> tuple[Array, Array]:
    """The tap before the last is one: every token gets its predecessor."""
    inputs = wave(70, 4)
    weight = jnp.zeros_like(inputs["weight"]).at[..., -2].set(1.0)
    shifted = jnp.pad(inputs["x"][:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    return run(inputs | {"weight": weight}, {}), shifted


def _one_tap_is_pointwise(run: Run) -> tuple[Array, Array]:
    inputs = wave(70, 1)
    return run(inputs, {}), inputs["x"] * inputs["weight"][..., 0]


def _ones_are_moving_sums(run: Run) -> tuple[Array, Array]:
    """Taps of one: sums over windows of 64, here from a cumulative sum of integers."""
    x = jnp.floor(8.0 * wave(200, 64)["x"])
    total = jnp.cumsum(x, axis=1)
    before = jnp.pad(total[:, :-64], ((0, 0), (64, 0), (0, 0), (0, 0)))
    return run({"x": x, "weight": jnp.ones((1, 8, 64))}, {}), total - before


def _bias_comes_before_the_gate(run: Run) -> tuple[Array, Array]:
    inputs = wave(70, 3) | {"bias": jnp.full((1, 8), 2.0)}
    gated = inputs | {"gate": inputs["x"]}
    return run(gated, _BIAS | _GATE), inputs["x"] * run(inputs, _BIAS)


PROPERTIES = (
    Property("an_impulse_shows_the_taps", _impulse_shows_the_taps),
    Property("the_tap_before_the_last_shifts_by_one", _tap_before_last_shifts),
    Property("one_tap_is_pointwise", _one_tap_is_pointwise),
    Property("taps_of_one_are_moving_sums", _ones_are_moving_sums),
    Property("bias_comes_before_the_gate", _bias_comes_before_the_gate),
)
