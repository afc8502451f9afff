"""Softmax attention: causal, with windows, ALiBi, a logits soft cap and grouped heads."""

import math

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from kernels import segments
from kernels.contract import Dims, InputSpec, Op, Options, StateSpec
from kernels.primitives import attention, kv_cache
from kernels.softmax import decode, jax_nn, reference
from kernels.softmax.cases import CASES, PROPERTIES, TOLERANCES


def _slopes(dims: Dims) -> Float[Array, " H"]:
    """ALiBi slopes 2^(-8 (h + 1) / H); other head counts borrow from the next power of two."""
    heads = dims["H"]
    power = 2 ** math.floor(math.log2(heads))
    exponents = [8.0 * (h + 1) / power for h in range(power)]
    exponents += [4.0 * (2 * h + 1) / power for h in range(heads - power)]
    return 2.0 ** -jnp.asarray(exponents, jnp.float32)


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    del dtype, target
    if options["window"] < 0 or options["logits_soft_cap"] < 0:
        values = f"window={options['window']}, logits_soft_cap={options['logits_soft_cap']}"
        return f"{values} must not be negative; 0 turns either off"
    return jax_nn.unsupported(dims, options) if form == "jax_nn" else None


def _flops(dims: Dims, options: Options) -> float:
    return attention.count_flops(dims, segments.count_pairs(dims["T"], window=options["window"]))


OP = Op(
    name="softmax",
    inputs=(
        *attention.QKV,
        InputSpec("alibi_slopes", "H", kind="constant", when=("alibi", True), fill=_slopes),
    ),
    out="B T H V",
    options={"scale": None, "window": 0, "alibi": False, "logits_soft_cap": 0.0},
    forms={
        "reference": "kernels.softmax.reference",
        "chunked": "kernels.softmax.chunked",
        "jax_nn": "kernels.softmax.jax_nn",
    },
    unsupported=_unsupported,
    prefer={
        "cpu": (("chunked", "the tiled form measures faster than jax.nn's on XLA:CPU"),),
        "gpu": (
            ("jax_nn", "jax.nn.dot_product_attention, the library's own path"),
            ("chunked", "the tiled form for any backend"),
        ),
        "tpu": (("chunked", "the tiled form for any backend; no TPU kernel yet"),),
    },
    state=StateSpec(kv_cache.FIELDS, "linear"),
    init_state=kv_cache.create,
    step=decode.step,
    sequence="none",
    flops=_flops,
    bytes=attention.count_bytes,
    cases=CASES,
    tolerances=TOLERANCES,
    properties=PROPERTIES,
    reference_vjp=reference.backward,
)
