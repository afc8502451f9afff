"""The largest array in compiled code, read from its text.

No train step may hold logits of shape B T vocab, and no op's backward pass weights of shape T T.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax

from kernels import contract, dispatch
from kernels.contract import Case
from launch.benchmarks import ops, problem
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

GOAL = Goal("<", 1.0)
LONG = Case({"B": 1, "T": 2048, "H": 8, "G": 8, "K": 64, "V": 64})


def run(options: Options) -> list[Result]:
    results = [_step(options, mixer) for mixer in problem.MIXERS]
    cases = (LONG,) if options.cases is None else options.cases
    names = [n for n in dispatch.names() if dispatch.get(n).state.growth == "linear"]
    return results + [_op(name, case) for name in names for case in cases]


def _step(options: Options, mixer: str) -> Result:
    built = problem.built(options, mixer)
    sizes = options.sizes
    logits = sizes.batch_size * sizes.context_length * built.model.padded_vocab_size
    return _result(
        f"memory/step/{mixer}", problem.compiled_step(options, built), "B T vocab", logits
    )


def _op(name: str, case: Case) -> Result:
    inputs = contract.sample(dispatch.get(name), case).inputs
    function = ops.attention(name, ops.resolve(name, case))
    gradient = jax.jit(jax.grad(lambda *x: function(*x).sum(), (0, 1, 2)))
    compiled = gradient.lower(inputs["q"], inputs["k"], inputs["v"]).compile()
    return _result(f"memory/op/{name}", compiled, "T T", case.dims["T"] ** 2)


def _result(name: str, compiled: Any, unit: str, limit: int) -> Result:
    shape = largest_shape(compiled.as_text())
    memory = compiled.memory_analysis()
    facts = {
        "unit": unit,
        "largest": list(shape),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
    }
    return Result(name=name, value=math.prod(shape) / limit, goal=GOAL, facts=facts)


def largest_shape(text: str) -> tuple[int, ...]:
    """The shape with the most elements in the text of a compiled module.

    >>> largest_shape("%a = f32[4,8]{1,0} add(f32[4,8]{1,0} %b, pred[3]{0} %c)")
    (4, 8)
    """
    found = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)
    shapes = {tuple(int(n) for n in shape.split(",")) for shape in found}
    return max(shapes, key=math.prod)
