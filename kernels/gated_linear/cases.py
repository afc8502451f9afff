"""Problems, tolerances and properties of linear attention with decay.

The fast cases are chosen so that any two settings of T, widths, documents, carried state and decay
occur together in some case; the slow cases thin their product (`contract.thinned`).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels.contract import Case, Property, Run, Tolerance, extremes
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.chunks import dims, near

_SCALAR = {"decay": "scalar"}
_VECTOR = {"decay": "vector"}
_OPTIONS: tuple[dict[str, Any], ...] = ({}, _SCALAR, _VECTOR, _VECTOR | {"scale": 0.5})

FAST = (
    Case(dims(257, 17, 17), _VECTOR, "packed", tag="fast"),
    Case(dims(257, 16, 9), _SCALAR, "padded", carried=True, tag="fast"),
    Case(dims(65, 7, 16), {}, "padded", carried=True, tag="fast"),
    Case(dims(64, 17, 9), _VECTOR, "padded", carried=True, tag="fast"),
    Case(dims(63, 16, 16), _SCALAR | {"scale": 0.5}, "none", carried=True, tag="fast"),
    Case(dims(1, 16, 9), _VECTOR, "none", carried=True, tag="fast"),
    Case(dims(65, 16, 16), _SCALAR, "packed", dtype="bfloat16", tag="fast"),
    Case(dims(63, 9, 16), {}, "packed", tag="fast"),
)

# Nothing is forgotten; or everything at every token; or everything at every other token.
_FORGET = (
    near("log_decay", -1e-6),
    near("log_decay", -40.0),
    near("log_decay", -1e-4, -40.0),
)
EXTREME = (
    *extremes(Case(dims(257, 16, 9), _SCALAR, "padded", carried=True, tag="fast"), *_FORGET),
    *extremes(Case(dims(64, 17, 9), _VECTOR, "padded", carried=True, tag="fast"), *_FORGET),
)

BENCH = tuple(
    Case({"B": 4, "T": time, "H": 4, "K": 64, "V": 64}, options, tag="bench")
    for time in (512, 2048)
    for options in ({}, _SCALAR, _VECTOR)
)

CASES = FAST + EXTREME + chunks.every_case(_OPTIONS) + BENCH

_ROUNDING = "the same float32 sums in another order"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; all else is float32"
_OPERANDS = "outputs and operands (factors times q or k, weights, states) are rounded to bfloat16"

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


def _wave(time: int, width: int = 8) -> Inputs:
    """q, k and v of one head, without randomness."""
    x = jnp.sin(jnp.arange(time * width, dtype=jnp.float32) ** 1.5).reshape(1, time, 1, width)
    return {"q": 2.0 * x, "k": x[..., ::-1], "v": x[..., :5]}


def _times_matrix(inputs: Inputs, matrix: Array) -> Array:
    """(matrix * q k^T) v for one head."""
    weights = matrix * (inputs["q"][0, :, 0] @ inputs["k"][0, :, 0].T)
    return (weights @ inputs["v"][0, :, 0])[None, :, None]


def _no_decay_is_masked_attention(run: Run) -> tuple[Array, Array]:
    inputs = _wave(150)
    return run(inputs, {"scale": 1.0}), _times_matrix(inputs, jnp.tri(150))


def _decay_of_one_is_no_decay(run: Run) -> tuple[Array, Array]:
    inputs = _wave(150)
    ones = jnp.zeros((1, 150, 1))
    return run(inputs | {"log_decay": ones}, _SCALAR), run(inputs, {})


def _channels_of_one_are_no_decay(run: Run) -> tuple[Array, Array]:
    inputs = _wave(150)
    return run(inputs | {"log_decay": jnp.zeros((1, 150, 1, 8))}, _VECTOR), run(inputs, {})


def _constant_decay_is_retention(run: Run) -> tuple[Array, Array]:
    """D_ij = gamma^(i - j), with gamma = 31/32 as in the first head of RetNet."""
    inputs = _wave(150)
    distance = jnp.arange(150)[:, None] - jnp.arange(150)
    decays = jnp.where(distance >= 0, (31.0 / 32.0) ** jnp.maximum(distance, 0), 0.0)
    constant = jnp.full((1, 150, 1), jnp.log1p(-1.0 / 32.0))
    got = run(inputs | {"log_decay": constant}, {"scale": 1.0} | _SCALAR)
    return got, _times_matrix(inputs, decays)


def _uneven(time: int) -> Array:
    """Log decays of one head: mild, but strong at every ninth token and total at every tenth."""
    index = jnp.arange(time)
    mild = -0.1 * (1.0 + jnp.sin(index**1.3))
    return jnp.where(index % 10 == 9, -1e4, jnp.where(index % 9 == 8, -50.0, mild))[None, :, None]


def _sums_after_strong_decay_keep_their_digits(run: Run) -> tuple[Array, Array]:
    inputs, log_decay = _wave(150), _uneven(150)
    later = jnp.tri(150, dtype=bool)
    terms = jnp.where(later[:, None, :] & ~later[None, :, :], log_decay[0, :, 0], 0.0)
    decays = jnp.where(later, jnp.exp(jnp.sum(terms, axis=-1)), 0.0)
    got = run(inputs | {"log_decay": log_decay}, {"scale": 1.0} | _SCALAR)
    return got, _times_matrix(inputs, decays)


def _equal_channels_are_one_decay(run: Run) -> tuple[Array, Array]:
    inputs, log_decay = _wave(150), _uneven(150)
    wide = jnp.broadcast_to(log_decay[..., None], (1, 150, 1, 8))
    got = run(inputs | {"log_decay": wide}, _VECTOR)
    return got, run(inputs | {"log_decay": log_decay}, _SCALAR)


def _forgetting_all_leaves_the_token(run: Run) -> tuple[Array, Array]:
    """o_t = scale (q_t . k_t) v_t."""
    inputs = _wave(150)
    strong = jnp.full((1, 150, 1, 8), -50.0).at[..., ::2].set(-1e4)
    got = run(inputs | {"log_decay": strong}, {"scale": 0.5} | _VECTOR)
    return got, 0.5 * jnp.sum(inputs["q"] * inputs["k"], -1, keepdims=True) * inputs["v"]


PROPERTIES = (
    Property("no_decay_is_masked_attention", _no_decay_is_masked_attention),
    Property("decay_of_one_is_no_decay", _decay_of_one_is_no_decay),
    Property("channels_of_one_are_no_decay", _channels_of_one_are_no_decay),
    Property("constant_decay_is_retention", _constant_decay_is_retention),
    Property("sums_after_strong_decay", _sums_after_strong_decay_keep_their_digits),
    Property("equal_channels_are_one_decay", _equal_channels_are_one_decay),
    Property("forgetting_all_leaves_the_token", _forgetting_all_leaves_the_token),
)
