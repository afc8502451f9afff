"""Forward and backward of our two attention ops against jax.nn's XLA attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import contract, dispatch
from kernels.contract import Case
from launch.benchmarks import timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

LONG = 2048  # tokens from which the goals hold
GOALS = {
    ("stickbreaking", "softmax"): Goal("<=", 2.0),
    ("stickbreaking", "jax.nn"): Goal("<=", 1.0),
    ("softmax", "jax.nn"): None,
}


def run(options: Options) -> list[Result]:
    cases = options.cases
    if cases is None:
        cases = tuple(c for c in dispatch.get("stickbreaking").cases if c.tag == "bench")
    return [result for case in cases for result in _compare(case, options.pairs)]


def _compare(case: Case, pairs: int) -> list[Result]:
    forms = {name: resolve(name, case) for name in ("stickbreaking", "softmax")}
    functions: dict[str, Callable[..., jax.Array]] = {
        name: attention(name, form) for name, form in forms.items()
    }
    functions["jax.nn"] = _jax_nn
    inputs = contract.sample(dispatch.get("softmax"), case).inputs
    arrays = inputs["q"], inputs["k"], inputs["v"]
    sides = {
        name: timing.call(_forward_and_backward(function), *arrays, arrays[2])
        for name, function in functions.items()
    }
    samples = timing.interleave(sides, pairs)
    sizes = "-".join(f"{letter}{case.dims[letter]}" for letter in "BTHK")
    return [
        timing.ratio(
            f"ops/{sizes}/{a} over {b}",
            samples,
            (a, b),
            goal if case.dims["T"] >= LONG else None,
            dims=dict(case.dims),
            forms=forms,
        )
        for (a, b), goal in GOALS.items()
    ]


def resolve(name: str, case: Case) -> str:
    """The form that `auto` chooses for the op on this device."""
    return dispatch.resolve(
        name,
        "auto",
        target=jax.default_backend(),
        dims=case.dims,
        dtype=case.dtype,
        options=case.options,
        device_kind=jax.devices()[0].device_kind,
    ).form


def attention(name: str, form: str) -> Callable[..., jax.Array]:
    """q, k, v -> the op's output."""

    def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dispatch.apply(name, {"q": q, "k": k, "v": v}, form=form)[0]

    return function


def _jax_nn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def _forward_and_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        out, pullback = jax.vjp(function, q, k, v)
        return out, pullback(cotangent.astype(jnp.result_type(out)))

    return both
