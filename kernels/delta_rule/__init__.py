"""The delta rule: a memory that writes the error it makes, without decay (DeltaNet) or gated."""

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
from kernels.delta_rule import decode, reference, tile
from kernels.delta_rule.cases import CASES, PROPERTIES, TOLERANCES
from kernels.primitives import device, pallas_chunks


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    if options["decay"] not in ("none", "scalar"):
        return f"decay={options['decay']!r} must be one of none, scalar"
    if form not in device.TARGETS:
        return None
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"its inputs are {jnp.dtype(dtype).name}; set float32 or bfloat16"
    if form == "pallas_tpu":
        return pallas_chunks.refusal(dims["H"], (dims["K"], dims["V"]))
    if dims["K"] > 256:
        return f"K={dims['K']} is wider than the 256 a program can carry; set form to chunked"
    return None


def _init_state(dims: Dims, dtype: DTypeLike, batch: int, max_len: int) -> tile.Memory:
    """An empty memory: float32 whatever the inputs are, and the same size for any length."""
    del dtype, max_len
    s = jnp.zeros((batch, dims["H"], dims["K"], dims["V"]), jnp.float32)
    return tile.Memory(s, jnp.zeros((batch,), jnp.int32))


def _flops(dims: Dims, options: Options) -> float:
    """Three products of K x V per token and head: to recall, to write and to read."""
    del options
    return 6.0 * dims["B"] * dims["T"] * dims["H"] * dims["K"] * dims["V"]


def _bytes(dims: Dims, options: Options, itemsize: int) -> float:
    """Bytes of the inputs and of the output."""
    gates = 2 if options["decay"] == "scalar" else 1
    per_head = 2 * dims["K"] + 2 * dims["V"] + gates
    return float(dims["B"] * dims["T"] * dims["H"] * per_head * itemsize)


OP = Op(
    name="delta_rule",
    inputs=(
        InputSpec("q", "B T H K"),
        InputSpec("k", "B T H K", "unit"),
        InputSpec("v", "B T H V"),
        InputSpec("beta", "B T H", "gate"),
        InputSpec("log_decay", "B T H", "log_decay", when=("decay", "scalar")),
    ),
    out="B T H V",
    options={"scale": None, "decay": "none"},
    forms=modules(__name__, "reference", "chunked", "pallas_tpu", "triton_gpu"),
    unsupported=_unsupported,
    prefer=everywhere(
        "chunked", "the chunk form for any backend", gpu="triton_gpu", tpu="pallas_tpu"
    ),
    state=StateSpec(tile.FIELDS, "constant"),
    init_state=_init_state,
    step=decode.step,
    sequence=strategies(__name__),
    flops=_flops,
    bytes=_bytes,
    cases=CASES,
    tolerances=TOLERANCES,
    properties=PROPERTIES,
    reference_vjp=reference.backward,
)
