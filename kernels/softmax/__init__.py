"""Softmax attention: windows, blocks, global tokens, sinks, ALiBi, soft cap, grouped heads."""

import math

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

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
    for name in ("window", "logits_soft_cap", "block", "global_tokens", "distance_ceiling"):
        if options[name] < 0:
            return f"{name}={options[name]} must not be negative; 0 turns it off"
    window, block, first = options["window"], options["block"], options["global_tokens"]
    if block and window:
        return f"block={block} and window={window} exclude each other; set one of them to 0"
    if first and not window:
        return f"global_tokens={first} needs a window: without one every key is visible"
    reason = _unsupported_ceiling(dims, options)
    if reason is None and form == "jax_nn":
        reason = jax_nn.unsupported(dims, dtype, options, target)
    if reason is None and form == "pallas_tpu":
        reason = _unsupported_splash(dtype, options, target)
    return reason


def _unsupported_splash(dtype: DTypeLike, options: Options, target: str) -> str | None:
    for name in ("alibi", "global_tokens", "distance_ceiling"):
        if options[name]:
            return f"splash attention has no {name}={options[name]}"
    if target == "tpu" and dtype != jnp.bfloat16:
        name = jnp.dtype(dtype).name
        return f"splash attention rounds {name} operands to bfloat16; set form to chunked"
    return None


def _unsupported_ceiling(dims: Dims, options: Options) -> str | None:
    ceiling, theta = options["distance_ceiling"], options["rope_theta"]
    if not ceiling:
        if theta:
            return f"rope_theta={theta} needs a distance_ceiling; set rope_theta to 0 without one"
        return None
    setting = f"distance_ceiling={ceiling}"
    if not (options["window"] and options["global_tokens"]):
        return f"{setting} needs window and global_tokens: else no key is seen beyond the window"
    if ceiling > options["window"]:
        return f"{setting} must be at most window={options['window']}"
    if options["alibi"]:
        return f"{setting} is a distance of rotations, and alibi=True has no rotations"
    if theta <= 0:
        return f"{setting} needs rope_theta={theta} to be positive"
    if dims["K"] % 2:
        return f"{setting} rotates pairs of channels, and K={dims['K']} is odd"
    return None


def _counts_places(options: Options) -> bool:
    """Global tokens and a ceiling need no check of their own: they come with a window."""
    return bool(options["window"] or options["block"] or options["alibi"])


def _flops(dims: Dims, options: Options) -> float:
    time, window = dims["T"], options["window"]
    if size := options["block"]:
        whole, rest = divmod(time, size)
        pairs = whole * segments.count_pairs(size) + segments.count_pairs(rest)
        return attention.count_flops(dims, pairs)
    pairs = segments.count_pairs(time, window=window)
    if first := options["global_tokens"]:
        # Query i sees min(first, i - window + 1) keys beyond its window.
        pairs += segments.count_pairs(max(time - window, 0), window=first)
    return attention.count_flops(dims, pairs)


OP = Op(
    name="softmax",
    inputs=(
        *attention.QKV,
        InputSpec("alibi_slopes", "H", kind="constant", when=("alibi", True), fill=_slopes),
        InputSpec("sink", "H", when=("sink", True)),
    ),
    out="B T H V",
    options={
        "scale": None,
        "window": 0,
        "alibi": False,
        "logits_soft_cap": 0.0,
        "block": 0,
        "sink": False,
        "global_tokens": 0,
        "distance_ceiling": 0,
        "rope_theta": 0.0,
    },
    forms=modules(__name__, "reference", "chunked", "jax_nn", "pallas_tpu"),
    unsupported=_unsupported,
    prefer={
        "cpu": (("chunked", "the tiled form measures faster than jax.nn's on XLA:CPU"),),
        "gpu": (
            ("jax_nn", "jax.nn.dot_product_attention, the library's own path"),
            ("chunked", "the tiled form for any backend"),
        ),
        "tpu": everywhere("chunked", "the tiled form for any backend", tpu="pallas_tpu")["tpu"],
    },
    state=StateSpec(kv_cache.FIELDS, "linear"),
    init_state=kv_cache.create,
    step=decode.step,
    for_steps=kv_cache.by_head,
    sequence=strategies(__name__),
    flops=_flops,
    bytes=attention.count_bytes,
    counts_places=_counts_places,
    cases=CASES,
    tolerances=TOLERANCES,
    properties=PROPERTIES,
    reference_vjp=reference.backward,
)
