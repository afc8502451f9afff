"""Diagonal linear recurrences: a gate per token, complex modes that are constant in time, or a
running sum in log space."""

import jax.numpy as jnp
from jaxtyping import DTypeLike

from kernels.contract import (
    Dims,
    InputSpec,
    Op,
    Options,
    StateSpec,
    everywhere,
    modules,
    strategies,
)
from kernels.linear_scan import decode, tile
from kernels.linear_scan.cases import CASES, PROPERTIES, TOLERANCES

MODES = ("transition", "modes")


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    del form, dtype, target
    if options["transition"] not in ("gate", "modes", "log_sum"):
        return f"transition={options['transition']!r} must be one of gate, modes, log_sum"
    if dims.get("N", 1) < 1:
        return f"N={dims['N']} modes must be at least 1"
    return None


def _init_state(dims: Dims, dtype: DTypeLike, batch: int, max_len: int) -> tile.Modes:
    """h = 0: float32 whatever the inputs are, the same size for any length; gates have N = 1."""
    del dtype, max_len
    zeros = jnp.zeros((batch, dims["H"], dims["K"], dims.get("N", 1)), jnp.float32)
    return tile.Modes(zeros, zeros, jnp.zeros((batch,), jnp.int32))


def _flops(dims: Dims, options: Options) -> float:
    """A gate costs one multiply-add. A mode is rotated by a 2 x 2 matrix and read by two numbers. A
    sum in log space has no product."""
    each = {"gate": 2.0, "modes": 12.0 * dims.get("N", 1), "log_sum": 0.0}
    return each[options["transition"]] * dims["B"] * dims["T"] * dims["H"] * dims["K"]


def _bytes(dims: Dims, options: Options, itemsize: int) -> float:
    """Bytes of the inputs and of the output."""
    rows = (3 if options["transition"] == "gate" else 2) * dims["B"] * dims["T"]
    shared = 4 * dims["N"] if options["transition"] == "modes" else 0
    return float((rows + shared) * dims["H"] * dims["K"] * itemsize)


OP = Op(
    name="linear_scan",
    inputs=(
        InputSpec("x", "B T H K"),
        InputSpec("log_decay", "B T H K", "log_decay", when=("transition", "gate")),
        InputSpec("log_magnitude", "H K N", "log_decay", when=MODES),
        InputSpec("angle", "H K N", when=MODES),
        InputSpec("c_re", "H K N", when=MODES),
        InputSpec("c_im", "H K N", when=MODES),
    ),
    out="B T H K",
    options={"transition": "modes"},
    forms=modules(__name__, "reference", "chunked"),
    unsupported=_unsupported,
    prefer=everywhere("chunked", "the chunk form for any backend"),
    state=StateSpec(tile.FIELDS, "constant"),
    init_state=_init_state,
    step=decode.step,
    sequence=strategies(__name__),
    flops=_flops,
    bytes=_bytes,
    cases=CASES,
    tolerances=TOLERANCES,
    properties=PROPERTIES,
)
