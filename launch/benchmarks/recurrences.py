"""Every op against softmax at one length, and how the time of recurrent ones grows with T.

Forward and backward are timed together, for every setting in an op's bench cases, in the form that
`auto` chooses here (chunked on a CPU). With `--precision=bfloat16` the inputs are bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels import contract, dispatch
from kernels.contract import Case
from launch.benchmarks import ops, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

GROWTH = Goal("<=", 2.2)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """`beside`: tokens at which ops are compared with softmax. `growth`: two lengths; the
    time of a recurrent op should grow in proportion to them.
    """

    beside: int = 2048
    growth: tuple[int, int] = (4096, 8192)


DIMS = {"B": 4, "H": 4, "G": 4, "K": 64, "V": 64}
BASELINE = ("softmax", {})


def run(
    options: Options, lengths: Lengths = Lengths(), dims: Mapping[str, int] = DIMS
) -> list[Result]:
    dtype = "float32" if options.precision == "float32" else "bfloat16"
    found = dict(_settings(dims, dtype))
    results = _beside(found, lengths.beside, options.pairs)
    for name, (op, case) in found.items():
        if dispatch.get(op).state.growth == "constant":
            results.append(_growth(name, op, case, lengths.growth, options.pairs))
    return results


def _settings(dims: Mapping[str, int], dtype: str) -> Iterator[tuple[str, tuple[str, Case]]]:
    """A name, an op and a case for each setting of the ops' bench cases."""
    for op in dispatch.names():
        for case in dispatch.get(op).cases:
            if case.tag == "bench":
                sizes = {k: v for k, v in case.dims.items() if k in "NW"} | dict(dims)
                parts = [f"{k}={v}" for k, v in case.options.items()]
                parts += [f"W={sizes['W']}"] if "W" in sizes else []
                yield " ".join([op, *parts]), (op, Case(sizes, case.options, dtype=dtype))


def _beside(found: Mapping[str, tuple[str, Case]], time: int, pairs: int) -> list[Result]:
    sides = {name: side(op, at(case, time)) for name, (op, case) in found.items()}
    baseline = next(name for name, (op, case) in found.items() if (op, case.options) == BASELINE)
    samples = timing.interleave(sides, pairs)
    return [
        timing.ratio(
            f"recurrences/T{time}/{name} over {baseline}",
            samples,
            (name, baseline),
            form=ops.resolve(op, at(case, time)),
            dims=at(case, time).dims,
            dtype=case.dtype,
        )
        for name, (op, case) in found.items()
        if name != baseline
    ]


def _growth(name: str, op: str, case: Case, lengths: tuple[int, int], pairs: int) -> Result:
    short, long = lengths
    sides = {f"T{time}": side(op, at(case, time)) for time in (long, short)}
    samples = timing.interleave(sides, max(1, pairs // 2))
    over = f"T{long}", f"T{short}"
    goal = GROWTH if long == 2 * short else None
    return timing.ratio(f"recurrences/growth/{name}", samples, over, goal, dtype=case.dtype)


def at(case: Case, time: int) -> Case:
    """The same problem with T tokens."""
    return dataclasses.replace(case, dims={**case.dims, "T": time})


def side(op: str, case: Case) -> Callable[[], object]:
    """The op's forward and backward, compiled in the form that `auto` chooses here."""
    inputs = contract.sample(dispatch.get(op), case).inputs
    form = ops.resolve(op, case)

    def both(inputs: Any, cotangent: jax.Array) -> Any:
        call = lambda inputs: dispatch.apply(op, inputs, form=form, options=case.options)[0]
        out, pull = jax.vjp(call, inputs)
        return out, pull(cotangent)

    shape = [case.dims[letter] for letter in dispatch.get(op).out.split()]
    return timing.call(both, inputs, jnp.ones(shape, case.dtype))
