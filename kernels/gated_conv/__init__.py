"""A causal convolution of every channel along time, with W taps and optional bias and gate."""

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
from kernels.gated_conv import decode, tile
from kernels.gated_conv.cases import CASES, PROPERTIES, TOLERANCES


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    del form, dtype, target
    for name in ("bias", "gate"):
        if options[name] not in (False, True):
            return f"{name}={options[name]!r} must be True or False"
    if dims.get("W", 1) < 1:
        return f"W={dims['W']} taps must be at least 1, the token itself"
    return None


def _init_state(dims: Dims, dtype: DTypeLike, batch: int, max_len: int) -> tile.Tail:
    """No inputs so far: float32 whatever the inputs are, and the same size for any length."""
    del dtype, max_len
    tail = jnp.zeros((batch, dims["H"], dims["W"], dims["K"]), jnp.float32)
    return tile.Tail(tail, jnp.zeros((batch,), jnp.int32))


def _flops(dims: Dims, options: Options) -> float:
    """One multiply-add per tap, channel and token."""
    del options
    return 2.0 * dims["B"] * dims["T"] * dims["H"] * dims["K"] * dims["W"]


def _bytes(dims: Dims, options: Options, itemsize: int) -> float:
    """Bytes of the inputs and of the output."""
    channels = dims["H"] * dims["K"]
    arrays = 3 if options["gate"] else 2
    shared = dims["W"] + (1 if options["bias"] else 0)
    return float((arrays * dims["B"] * dims["T"] + shared) * channels * itemsize)


OP = Op(
    name="gated_conv",
    inputs=(
        InputSpec("x", "B T H K"),
        InputSpec("weight", "H K W"),
        InputSpec("bias", "H K", when=("bias", True)),
        InputSpec("gate", "B T H K", when=("gate", True)),
    ),
    out="B T H K",
    options={"bias": False, "gate": False},
    forms=modules(__name__, "reference", "chunked"),
    unsupported=_unsupported,
    prefer=everywhere("chunked", "shifted multiply-adds that XLA fuses"),
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
