"""Linear attention with decay: none, per head, or per channel of the key."""

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
from kernels.gated_linear import decode, reference
from kernels.gated_linear.cases import CASES, PROPERTIES, TOLERANCES
from kernels.gated_linear.tile import FIELDS, GatedState
from kernels.primitives import device, pallas_chunks


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    if options["decay"] not in ("none", "scalar", "vector"):
        return f"decay={options['decay']!r} must be one of none, scalar, vector"
    if form not in device.TARGETS:
        return None
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"its inputs are {jnp.dtype(dtype).name}; set float32 or bfloat16"
    if form == "pallas_tpu":
        return pallas_chunks.refusal(dims["H"], (dims["K"], dims["V"]))
    return None


def _init_state(dims: Dims, dtype: DTypeLike, batch: int, max_len: int) -> GatedState:
    """An empty memory: float32 whatever the inputs are, and the same size for any length."""
    del dtype, max_len
    shape = (batch, dims["H"], dims["K"], dims["V"])
    return GatedState(jnp.zeros(shape, jnp.float32), jnp.zeros((batch,), jnp.int32))


def _flops(dims: Dims, options: Options) -> float:
    """FLOPs of the recurrence: k v^T and S^T q."""
    del options
    return 4.0 * dims["B"] * dims["T"] * dims["H"] * dims["K"] * dims["V"]


def _bytes(dims: Dims, options: Options, itemsize: int) -> float:
    """Bytes of the inputs and of the output."""
    decay = {"none": 0, "scalar": 1, "vector": dims["K"]}[options["decay"]]
    per_head = 2 * dims["K"] + 2 * dims["V"] + decay
    return float(dims["B"] * dims["T"] * dims["H"] * per_head * itemsize)


OP = Op(
    name="gated_linear",
    inputs=(
        InputSpec("q", "B T H K"),
        InputSpec("k", "B T H K"),
        InputSpec("v", "B T H V"),
        InputSpec("log_decay", "B T H", "log_decay", when=("decay", "scalar")),
        InputSpec("log_decay", "B T H K", "log_decay", when=("decay", "vector")),
    ),
    out="B T H V",
    options={"scale": None, "decay": "none"},
    forms=modules(__name__, "reference", "chunked", "pallas_tpu", "triton_gpu"),
    unsupported=_unsupported,
    prefer=everywhere(
        "chunked", "the chunked form for any backend", gpu="triton_gpu", tpu="pallas_tpu"
    ),
    state=StateSpec(FIELDS, "constant"),
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
