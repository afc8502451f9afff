"""The kernels of this device against its softmax kernel, the chunked forms and its ceilings.

    espalier bench --cases=kernels,peers --pairs=10 --precision=bfloat16 --out=FILE

All in bfloat16, forward alone and with the backward pass. The goal of stick-breaking holds for shy
keys, where nothing stops early (`forms`). The row of a problem that does not fit or does not
compile says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import ceilings, forms, timing
from launch.benchmarks.ceilings import Ceilings
from launch.benchmarks.forms import Sizes, Timed
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError

ATTENTION, BASELINE = "stickbreaking", "softmax"
GOAL = Goal("<=", 2.0)


def check(options: Options) -> None:
    """Raises:
    UserError: no op has a kernel for the device that JAX finds here.
    """
    del options
    if not _names():
        raise UserError(
            f"--cases=kernels needs a GPU or a TPU, but JAX's backend is {jax.default_backend()}; "
            "leave it out of --cases"
        )


def _names() -> list[str]:
    """Ops with a kernel for this device, without the baseline."""
    target = jax.default_backend()
    return [name for name in dispatch.names() if forms.kernel(name, target) and name != BASELINE]


def run(options: Options, sizes: Sizes = forms.SIZES) -> Iterator[Result]:
    """Raises:
    UserError: as `check`.
    """
    check(options)
    limits = ceilings.measure(sizes, options.pairs)
    yield from limits.results("kernels")
    settings = [(name, how) for name in _names() for how in forms.settings(name)]
    for problem in forms.timed(settings, sizes):
        yield from _beside(problem, options.pairs, limits)


def _beside(problem: Timed, pairs: int, limits: Ceilings) -> Iterator[Result]:
    """A row for each pass and each side that the kernel is compared with."""
    kernel = forms.chosen(problem.op, problem.case)
    sides = {"kernel": (problem, kernel.form), "chunked": (problem, "chunked")}
    if problem.op == ATTENTION:
        plain = Case(problem.case.dims, dtype=problem.case.dtype)
        form = forms.chosen(BASELINE, plain).form
        sides[BASELINE] = (problem._replace(op=BASELINE, case=plain), form)
    inputs = forms.drawn(problem)
    for which in forms.PASSES:
        timers, refused = _compiled(sides, which, inputs)
        facts: dict[str, Any] = {
            "dims": dict(problem.case.dims),
            "dtype": problem.case.dtype,
            "forms": {side: form for side, (_, form) in sides.items()},
            "refused": kernel.refused | refused,
        }
        samples: timing.Samples = {}
        if "kernel" in timers:
            samples = timing.take_turns(timers, pairs)
            ours = problem.op, problem.case, which, samples["kernel"]
            facts["of_ceilings"] = limits.fractions(*ours)
        for other in list(sides)[1:]:
            name = f"kernels/{problem.title}/{which}/over {other}"
            goal = GOAL if (other, problem.keys) == (BASELINE, forms.SHY) else None
            if other in samples:
                yield timing.ratio(name, samples, ("kernel", other), goal, **facts)
            else:
                yield timing.refused(name, **facts)


def _compiled(
    sides: dict[str, tuple[Timed, str]], which: str, inputs: Any
) -> tuple[dict[str, timing.Timer], dict[str, str]]:
    """Timers of the sides that run, and why the others do not."""
    timers: dict[str, timing.Timer] = {}
    refused: dict[str, str] = {}
    for side, (problem, form) in sides.items():
        try:
            timers[side] = forms.timer(problem, form, which, inputs)
        except forms.REFUSALS as error:
            refused[side] = forms.reason(error)
    return timers, refused
