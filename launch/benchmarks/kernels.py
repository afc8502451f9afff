"""The kernels of this device beside its own softmax kernel, beside the chunked forms, and beside
what the device can multiply and copy. bfloat16, forward alone and with the backward pass.

Where a problem does not fit or does not compile, its row says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import forms, ops, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError

WIDTHS = (64, 128)
LENGTHS = (2048, 8192, 32768)
TOKENS, HEADS = 32768, 16  # of a batch: rows x length, and heads of every row
SQUARE, COPIED = 8192, 1 << 30  # of the product and of the copy that stand for the ceilings
ATTENTION, BASELINE = "stickbreaking", "softmax"
GOAL = Goal("<=", 2.0)


class Ceilings(NamedTuple):
    """FLOP/s of a large product and bytes/s of a large copy, read and written, as measured."""

    flops: float
    bytes: float


def run(options: Options) -> list[Result]:
    """Raises:
    UserError: no kernel is written for what JAX finds here.
    """
    target = jax.default_backend()
    names = [name for name in dispatch.names() if forms.kernel(name, target)]
    if not names:
        raise UserError(
            f"--cases=kernels needs a GPU or a TPU, this is {target}; leave it out of --cases"
        )
    ceilings = measure_ceilings(options.pairs)
    results = [
        Result(name="kernels/ceiling/TFLOP per s", value=ceilings.flops / 1e12),
        Result(name="kernels/ceiling/TB per s", value=ceilings.bytes / 1e12),
    ]
    for name, case in problems(names):
        results += _beside(name, case, options.pairs, ceilings)
    return results


def problems(names: list[str]) -> Iterator[tuple[str, Case]]:
    """Every setting at every width and length, softmax aside."""
    settings = [(n, c) for n, c in forms.problems(names, WIDTHS, LENGTHS) if n != BASELINE]
    for name, case in settings:
        time = case.dims["T"]
        dims = {**case.dims, "B": max(1, TOKENS // time), "H": HEADS, "G": HEADS}
        yield name, Case(dims, case.options, dtype=case.dtype)


def measure_ceilings(pairs: int) -> Ceilings:
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.standard_normal((SQUARE, SQUARE)), jnp.bfloat16) for _ in range(2))
    big = jnp.zeros((COPIED // 4,), jnp.float32)
    sides = {
        "product": timing.call(lambda a, b: a @ b, a, b),
        "copy": timing.call(lambda x: x + 1.0, big),
    }
    samples = timing.interleave(sides, pairs)
    product, copy = (float(np.median(samples[side])) for side in sides)
    return Ceilings(2.0 * SQUARE**3 / product, 2.0 * COPIED / copy)


def _beside(name: str, case: Case, pairs: int, ceilings: Ceilings) -> Iterator[Result]:
    here = forms.mesh(jax.devices()[0])
    sides = {"chunked": (name, "chunked"), "kernel": (name, _kernel(name, case))}
    if name == ATTENTION:
        sides[BASELINE] = (BASELINE, ops.resolve(BASELINE, Case(case.dims, dtype=case.dtype)))
    for which in ("forward", "both"):
        calls: dict[str, Callable[[], object]] = {}
        refused: dict[str, str] = {}
        for side, (op, form) in sides.items():
            problem = Case(case.dims, case.options if op == name else {}, dtype=case.dtype)
            function = forms.passes(op, problem, form, None, here)[which]
            try:
                calls[side] = timing.call(function, *forms.arrays(op, problem))
                calls[side]()
            except jax.errors.JaxRuntimeError as error:
                calls.pop(side, None)
                refused[side] = str(error).splitlines()[0]
        yield from _results(name, case, which, calls, refused, pairs, ceilings)


def _kernel(name: str, case: Case) -> str:
    """The kernel, whether or not `auto` takes it; where it refuses the problem, what auto takes."""
    target = jax.default_backend()
    form = forms.kernel(name, target)
    if form is None or forms.refusal(name, case, form, target):
        return ops.resolve(name, case)
    return form


def _results(
    name: str,
    case: Case,
    which: str,
    calls: dict[str, Callable[[], object]],
    refused: dict[str, str],
    pairs: int,
    ceilings: Ceilings,
) -> Iterator[Result]:
    told = "-".join([*(f"{k}={v}" for k, v in case.options.items()), f"K{case.dims['K']}"])
    title = f"kernels/T{case.dims['T']}/{name} {told}/{which}"
    facts: dict[str, Any] = {"dims": dict(case.dims), "dtype": case.dtype, "refused": refused}
    if "kernel" not in calls:
        yield Result(name=f"{title}/refused", value=math.nan, facts=facts)
        return
    samples = timing.interleave(calls, pairs)
    op, passes = dispatch.get(name), 1.0
    if which == "both":
        passes += op.backward_flops
    seconds = float(np.median(samples["kernel"]))
    flops = passes * dispatch.flops(name, case.dims, case.options)
    moved = passes * op.bytes(case.dims, dispatch.bind_options(op, case.options, case.dims), 2)
    facts["of_ceilings"] = {
        "flops": flops / seconds / ceilings.flops,
        "bytes": moved / seconds / ceilings.bytes,
    }
    for other in calls.keys() - {"kernel"}:
        goal = GOAL if other == BASELINE else None
        yield timing.ratio(f"{title}/over {other}", samples, ("kernel", other), goal, **facts)
