"""Stick-breaking attention: each key takes a share of what nearer keys left; needs no positions."""

import jax.numpy as jnp
from jaxtyping import DTypeLike

from kernels import segments
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
from kernels.primitives import attention, kv_cache
from kernels.stickbreaking import decode, reference
from kernels.stickbreaking.cases import CASES, PROPERTIES, TOLERANCES


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    if options["remainder"] not in ("none", "value", "bias"):
        return f"remainder={options['remainder']!r} must be one of none, value, bias"
    if not 0.0 <= options["tolerance"] < 1.0:
        return f"tolerance={options['tolerance']} must lie in [0, 1); 0 is exact"
    return _unsupported_triton(dims, dtype) if form == "triton_gpu" else None


def _unsupported_triton(dims: Dims, dtype: DTypeLike) -> str | None:
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"its inputs are {jnp.dtype(dtype).name}; set float32 or bfloat16"
    if max(dims["K"], dims["V"]) > 256:
        return f"K={dims['K']}, V={dims['V']} are wider than 256; set form to chunked"
    return None


def _flops(dims: Dims, options: Options) -> float:
    return attention.count_flops(
        dims, segments.count_pairs(dims["T"], strict=not options["attend_current"])
    )


OP = Op(
    name="stickbreaking",
    inputs=(
        *attention.QKV,
        InputSpec("remainder_bias", "H V", when=("remainder", "bias")),
    ),
    out="B T H V",
    options={"scale": None, "attend_current": False, "remainder": "none", "tolerance": 0.0},
    forms=modules(__name__, "reference", "chunked", "pallas_tpu", "triton_gpu"),
    unsupported=_unsupported,
    prefer=everywhere(
        "chunked", "the tiled form for any backend", gpu="triton_gpu", tpu="pallas_tpu"
    ),
    state=StateSpec(kv_cache.FIELDS, "linear"),
    init_state=kv_cache.create,
    step=decode.step,
    for_steps=kv_cache.by_head,
    sequence=strategies(__name__),
    flops=_flops,
    bytes=attention.count_bytes,
    cases=CASES,
    tolerances=TOLERANCES,
    properties=PROPERTIES,
    reference_vjp=reference.backward,
)
