"""Problems, tolerances and properties of the delta rule.

The fast cases are chosen so that any two settings of T, widths, documents, carried state and decay
occur together in some case; the slow cases thin their product (`contract.thinned`).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.contract import Case, Drawn, Extreme, Property, Run, Tolerance, extremes
from kernels.letters import Inputs
from kernels.primitives import chunks
from kernels.primitives.chunks import dims, near

_SCALAR = {"decay": "scalar"}

FAST = (
    Case(dims(257, 17, 9), {}, "packed", tag="fast"),
    Case(dims(257, 16, 16), _SCALAR, "padded", carried=True, tag="fast"),
    Case(dims(64, 17, 17), _SCALAR, "none", tag="fast"),
    Case(dims(65, 9, 17), {"scale": 0.5}, "padded", carried=True, tag="fast"),
    Case(dims(63, 7, 16), _SCALAR | {"scale": 1.0}, "packed", tag="fast"),
    Case(dims(1, 16, 9), _SCALAR, "none", carried=True, tag="fast"),
    Case(dims(65, 16, 16), _SCALAR, "packed", dtype="bfloat16", tag="fast"),
    Case(dims(64, 16, 16), {}, "none", carried=True, gain=300.0, tag="fast"),
)


def _alike(extreme: Extreme) -> Extreme:
    """The same extreme, with keys that are nearly equal."""

    def change(drawn: Drawn) -> Drawn:
        key = drawn["k"][:, :1] + 1e-3 * drawn["k"]
        key = key / np.linalg.norm(key, axis=-1, keepdims=True)
        return {**extreme.change(drawn), "k": key}

    return Extreme(f"{extreme.name}alike", change)


# Tokens write nothing, replace what their key held, or reflect it; all is kept, or nothing is.
_FORGET = near("log_decay", -1e-6), near("log_decay", -40.0), near("log_decay", -1e-4, -40.0)
_WRITE = near("beta", 1e-6), near("beta", 2.0), near("beta", 1e-6, 2.0)
EXTREME = (
    *extremes(Case(dims(64, 17, 17), _SCALAR, tag="fast"), near("beta", 2.0), *_FORGET),
    *extremes(
        Case(dims(64, 16, 16), carried=True, tag="fast"),
        *_WRITE,
        _alike(near("beta", 1e-6)),
        _alike(near("beta", 1.0)),
    ),
    *extremes(
        Case(dims(257, 16, 16), _SCALAR, "padded", carried=True), near("beta", 2.0), *_FORGET
    ),
)

BENCH = tuple(
    Case({"B": batch, "T": time, "H": heads, "K": 64, "V": 64}, options, tag="bench")
    for batch, time, heads in ((1, 2048, 8), (4, 512, 4))
    for options in ({}, _SCALAR)
)

CASES = FAST + EXTREME + chunks.every_case(({}, _SCALAR)) + BENCH

_ROUNDING = "the same float32 sums in another order; the inverse adds no more (test_delta_rule)"
_OUTPUT = "outputs and gradients are rounded to bfloat16, 2^-9 each; all else is float32"
_OPERANDS = "outputs and operands (inverse, W, U, N, states, cotangents) are rounded to bfloat16"

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

_PLAIN = {"scale": 1.0}
_GATED = {"scale": 1.0, "decay": "scalar"}


def wave(time: int, width: int = 8) -> Inputs:
    """Inputs of one head without randomness: keys of length one, beta from 0.1 to 0.9."""
    x = jnp.sin(jnp.arange(time * width, dtype=jnp.float32) ** 1.5).reshape(1, time, 1, width)
    k = x[..., ::-1] + 0.1
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return {"q": 2.0 * x, "k": k, "v": jnp.cos(3.0 * x), "beta": 0.5 + 0.4 * x[..., 0]}


def _orthonormal_keys_recall(run: Run) -> tuple[Array, Array]:
    """beta = 1 and orthonormal keys: each query gets back its value, however old."""
    x = wave(70)
    key = jnp.eye(70)[None, :, None]
    ones = jnp.ones_like(x["beta"])
    # The second pass only reads, in the opposite order.
    asked = jnp.concatenate([jnp.zeros_like(key), key[:, ::-1]], axis=1)
    twice = lambda y, z: jnp.concatenate([y, z], axis=1)
    inputs = {"q": asked, "k": twice(key, key), "v": twice(x["v"], x["v"])}
    out = run(inputs | {"beta": twice(ones, 0.0 * ones)}, _PLAIN)
    return out[:, 70:], x["v"][:, ::-1]


def _repeated_key_overwrites(run: Run) -> tuple[Array, Array]:
    """beta = 1: a key's new value replaces its old one."""
    x = wave(140)
    key = jnp.tile(jnp.eye(70), (2, 1))[None, :, None]
    return run({"q": key, "k": key, "v": x["v"], "beta": jnp.ones((1, 140, 1))}, _PLAIN), x["v"]


def _one_key_copies(run: Run) -> tuple[Array, Array]:
    """All keys equal and beta = 1: the output is the newest value, and all older ones cancel."""
    x = wave(140)
    key = jnp.broadcast_to(x["k"][:, :1], x["k"].shape)
    return run({"q": key, "k": key, "v": x["v"], "beta": jnp.ones((1, 140, 1))}, _PLAIN), x["v"]


def _closed_gate_writes_nothing(run: Run) -> tuple[Array, Array]:
    """beta = 0: the memory stays empty."""
    x = wave(70)
    return run(x | {"beta": jnp.zeros_like(x["beta"])}, {}), jnp.zeros_like(x["v"])


def _zero_log_decay_is_none(run: Run) -> tuple[Array, Array]:
    """The gated rule with zero log decay is the plain rule."""
    x = wave(140)
    return run(x | {"log_decay": jnp.zeros_like(x["beta"])}, _GATED), run(x, _PLAIN)


def _small_gates_are_linear_attention(run: Run) -> tuple[Array, Array]:
    """To first order in beta: sum_{j <= i} beta_j (q_i . k_j) v_j."""
    x = wave(70)
    beta = 1e-8 * x["beta"]
    scores = jnp.tril(jnp.einsum("bihk,bjhk->bhij", x["q"], x["k"], precision="highest"))
    want = jnp.einsum("bhij,bjh,bjhv->bihv", scores, beta, x["v"], precision="highest")
    return run(x | {"beta": beta}, _PLAIN), want


def _one_channel_averages(run: Run) -> tuple[Array, Array]:
    """k = 1 of width 1: s_t = (1 - beta) s_{t-1} + beta v_t, an exponential moving average."""
    x = wave(140)
    one = jnp.ones((1, 140, 1, 1))
    age = jnp.arange(140)[:, None] - jnp.arange(140)
    weights = jnp.where(age >= 0, 0.25 * 0.75 ** jnp.maximum(age, 0), 0.0)
    want = jnp.einsum("ij,bjhv->bihv", weights, x["v"], precision="highest")
    return run({"q": one, "k": one, "v": x["v"], "beta": jnp.full((1, 140, 1), 0.25)}, {}), want


def _full_decay_sees_itself(run: Run) -> tuple[Array, Array]:
    """If everything is forgotten before each token, beta (q . k) v remains."""
    x = wave(140)
    own = jnp.sum(x["q"] * x["k"], axis=-1) * x["beta"]
    decay = jnp.full_like(x["beta"], -50.0)
    return run(x | {"log_decay": decay}, _GATED), own[..., None] * x["v"]


def _zero_keys_write_nothing(run: Run) -> tuple[Array, Array]:
    """Keys of zeros, as on padding: the memory stays empty."""
    x = wave(70)
    decay = jnp.full_like(x["beta"], -1.0)
    return run(x | {"k": 0.0 * x["k"], "log_decay": decay}, _GATED), jnp.zeros_like(x["v"])


PROPERTIES = (
    Property("orthonormal_keys_recall_exactly", _orthonormal_keys_recall),
    Property("a_repeated_key_overwrites", _repeated_key_overwrites),
    Property("identical_keys_copy_the_newest_value", _one_key_copies),
    Property("beta_zero_writes_nothing", _closed_gate_writes_nothing),
    Property("log_decay_zero_is_decay_none", _zero_log_decay_is_none),
    Property("small_beta_is_linear_attention", _small_gates_are_linear_attention),
    Property("width_one_is_a_moving_average", _one_channel_averages),
    Property("full_decay_sees_only_itself", _full_decay_sees_itself),
    Property("zero_keys_write_nothing", _zero_keys_write_nothing),
)
