"""Problems, tolerances and properties of diagonal linear recurrences.

The fast cases are chosen so that any two settings of T, widths, modes, documents, carried state and
transition occur together in some case; the slow cases thin their product (`contract.thinned`).
"""

import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Case, Property, Run, Tolerance, extremes
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.chunks import dims, near

_GATE = {"transition": "gate"}
_LOG_SUM = {"transition": "log_sum"}

FAST = (
    Case(dims(257, 17, 9, N=5), {}, "packed", carried=True, tag="fast"),
    Case(dims(257, 16, 16), _GATE, "padded", carried=True, tag="fast"),
    Case(dims(64, 9, 9, N=1), {}, "padded", tag="fast"),
    Case(dims(65, 7, 7), _GATE, "packed", tag="fast"),
    Case(dims(63, 16, 16, N=4), {}, "none", carried=True, tag="fast"),
    Case(dims(1, 17, 17, N=4), {}, "none", carried=True, tag="fast"),
    Case(dims(65, 16, 16, N=4), {}, "none", dtype="bfloat16", tag="fast"),
    Case(dims(64, 17, 17), _LOG_SUM, "padded", carried=True, tag="fast"),
)

# All or nothing is kept; sums of exponentials overflow float32; modes last, or vanish at once.
EXTREME = (
    *extremes(
        Case(dims(257, 16, 16), _GATE, "padded", carried=True, tag="fast"),
        near("log_decay", -1e-6),
        near("log_decay", -40.0),
        near("log_decay", -1e-4, -40.0),
    ),
    *extremes(
        Case(dims(64, 17, 17), _LOG_SUM, "padded", carried=True, tag="fast"),
        near("x", 100.0),
        near("x", -100.0),
        near("x", 100.0, -100.0),
    ),
    *extremes(
        Case(dims(63, 16, 16, N=4), carried=True, tag="fast"),
        near("log_magnitude", -1e-6),
        near("log_magnitude", -40.0),
        near("log_magnitude", -1e-4, -40.0),
    ),
)

BENCH = tuple(
    Case({"B": 4, "T": time, "H": 4, "K": 64} | modes, options, tag="bench")
    for time in (2048, 8192)
    for modes, options in (({"N": 32}, {}), ({}, _GATE), ({}, _LOG_SUM))
)

CASES = (
    FAST + EXTREME + chunks.every_case(({},), N=5) + chunks.every_case((_GATE, _LOG_SUM)) + BENCH
)

_ROUNDING = "the same float32 sums in another order"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; all else is float32"

TOLERANCES = {
    ("reference", "float32"): Tolerance(1e-5, _ROUNDING),
    ("reference", "bfloat16"): Tolerance(5e-3, _OUTPUT),
    ("chunked", "float32"): Tolerance(1e-5, _ROUNDING),
    ("chunked", "bfloat16"): Tolerance(5e-3, _OUTPUT),
}


def wave(time: int, width: int = 4, modes: int = 3) -> Inputs:
    """Inputs of one head without randomness, with modes of many speeds."""
    x = jnp.sin(jnp.arange(time * width, dtype=jnp.float32) ** 1.5).reshape(1, time, 1, width)
    number = jnp.arange(width * modes, dtype=jnp.float32).reshape(1, width, modes)
    return {
        "x": x,
        "log_magnitude": -0.01 * (1.0 + number),
        "angle": 0.3 * number,
        "c_re": jnp.cos(number),
        "c_im": jnp.sin(2.0 * number),
    }


def _kernel(inputs: Inputs, time: int) -> Array:
    """The impulse response of each channel, [T, K]; every power has its own exponential."""
    lag = jnp.arange(time, dtype=jnp.float32)[:, None, None]
    size = jnp.exp(lag * inputs["log_magnitude"][0])
    phase = lag * inputs["angle"][0]
    parts = inputs["c_re"][0] * jnp.cos(phase) - inputs["c_im"][0] * jnp.sin(phase)
    return jnp.sum(size * parts, axis=-1)


def _impulse_shows_the_kernel(run: Run) -> tuple[Array, Array]:
    """The response to an impulse is sum_n Re(c_n lambda_n^t)."""
    inputs = wave(150)
    impulse = jnp.zeros_like(inputs["x"]).at[:, 0].set(1.0)
    return run(inputs | {"x": impulse}, {}), _kernel(inputs, 150)[None, :, None]


def _recurrence_is_convolution(run: Run) -> tuple[Array, Array]:
    inputs = wave(150)
    lag = jnp.arange(150)[:, None] - jnp.arange(150)
    kernel = jnp.where((lag >= 0)[..., None], _kernel(inputs, 150)[jnp.maximum(lag, 0)], 0.0)
    want = jnp.einsum("tsk,bshk->bthk", kernel, inputs["x"], precision="highest")
    return run(inputs, {}), want


def _undamped_mode_is_a_cosine(run: Run) -> tuple[Array, Array]:
    """|lambda| = 1: the response to an impulse is cos(angle t), without end."""
    inputs = wave(300, modes=1)
    impulse = jnp.zeros_like(inputs["x"]).at[:, 0].set(1.0)
    angle = 2.0 * jnp.pi * jnp.array([[[1 / 4], [1 / 8], [1 / 16], [1 / 3]]], jnp.float32)
    plain = {"angle": angle, "log_magnitude": 0.0 * angle, "c_re": 1.0 + 0.0 * angle}
    turns = jnp.arange(300)[:, None] % jnp.array([4, 8, 16, 3])
    want = jnp.cos(turns * angle[0, :, 0])[None, :, None]
    return run(inputs | plain | {"x": impulse, "c_im": 0.0 * angle}, {}), want


def _open_gates_sum(run: Run) -> tuple[Array, Array]:
    """No decay: a cumulative sum, which is exact for integers."""
    x = jnp.floor(8.0 * wave(150)["x"])
    return run({"x": x, "log_decay": jnp.zeros_like(x)}, _GATE), jnp.cumsum(x, axis=1)


def _closed_gates_copy(run: Run) -> tuple[Array, Array]:
    """exp(-50) times the past is less than the rounding of the present."""
    x = 2.0 + wave(150)["x"]
    return run({"x": x, "log_decay": jnp.full_like(x, -50.0)}, _GATE), x


def _constant_gates_are_real_modes(run: Run) -> tuple[Array, Array]:
    inputs = wave(150, modes=1)
    real = inputs | {"angle": 0.0 * inputs["angle"], "c_re": 1.0 + 0.0 * inputs["angle"]}
    decay = jnp.broadcast_to(real["log_magnitude"][..., 0], inputs["x"].shape)
    return run({"x": inputs["x"], "log_decay": decay}, _GATE), run(real, {})


def _log_sums_are_logarithms_of_sums(run: Run) -> tuple[Array, Array]:
    """Holds also where e^x overflows float32: adding a constant to x adds it to the output."""
    x = 3.0 * wave(150)["x"]
    return run({"x": x + 100.0}, _LOG_SUM) - 100.0, jnp.log(jnp.cumsum(jnp.exp(x), axis=1))


PROPERTIES = (
    Property("log_sums_are_logarithms_of_sums", _log_sums_are_logarithms_of_sums),
    Property("an_impulse_shows_the_kernel", _impulse_shows_the_kernel),
    Property("the_recurrence_is_a_convolution", _recurrence_is_convolution),
    Property("an_undamped_mode_is_a_cosine", _undamped_mode_is_a_cosine),
    Property("log_decay_zero_is_a_cumulative_sum", _open_gates_sum),
    Property("strong_decay_copies", _closed_gates_copy),
    Property("constant_gates_are_real_modes", _constant_gates_are_real_modes),
)
