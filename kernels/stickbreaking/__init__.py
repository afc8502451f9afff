"""Stick-breaking attention: keys take shares of a stick, the nearest first. No positions needed."""

from jaxtyping import DTypeLike

from kernels import segments
from kernels.contract import Dims, InputSpec, Op, Options, StateSpec, everywhere, modules
from kernels.primitives import attention, kv_cache
from kernels.stickbreaking import decode, reference
from kernels.stickbreaking.cases import CASES, PROPERTIES, TOLERANCES


def _unsupported(
    form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    del form, dims, dtype, target
    if options["remainder"] not in ("none", "value", "bias"):
        return f"remainder={options['remainder']!r} must be one of none, value, bias"
    if not 0.0 <= options["tolerance"] < 1.0:
        return f"tolerance={options['tolerance']} must lie in [0, 1); 0 is exact"
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
    forms=modules(__name__, "reference", "chunked"),
    unsupported=_unsupported,
    prefer=everywhere("chunked", "the tiled form for any backend"),
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
