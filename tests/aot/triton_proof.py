"""What the compilers for an H100 make of the Triton kernels, where there is none.

    python -m tests.aot.triton_proof stickbreaking      a line of JSON for each program

A program is `dispatch.apply` of an op, forward or with its gradients, compiled for one H100. Every
kernel that jax-triton makes on the way is also given to ptxas, which says how many registers a
thread takes and how many bytes it spills. One op to a process: kernels are made once in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import dispatch
from lm import targets

SHARED_MEMORY = 227 * 1024  # bytes that a block of an H100 may have
PEAK = 1.5  # of inputs, outputs and residuals
SHAPE = {"B": 1, "T": 8192, "H": 16}


class Problem(NamedTuple):
    """A program; `documents` are packed rows. Widths K = V, key heads G = H unless given."""

    op: str
    width: int
    options: dict[str, Any]
    documents: bool = False
    groups: int = 16
    gradients: bool = True
    dtype: str = "bfloat16"
    form: str = "triton_gpu"

    @property
    def name(self) -> str:
        parts = [f"K{self.width}", f"G{self.groups}", "packed" if self.documents else "plain"]
        parts += [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.op, *parts, "gradients" if self.gradients else "forward"])


class Kernel(NamedTuple):
    """One kernel; bytes of shared memory of a block, registers and bytes spilled of a thread."""

    name: str
    wgmma: int
    registers: int
    spilled: int
    shared: int


class Program(NamedTuple):
    """Bytes that the compiler accounts for, bytes kept for the backward pass, and the kernels."""

    name: str
    argument: int
    output: int
    temp: int
    residuals: int
    kernels: tuple[Kernel, ...]

    @property
    def peak(self) -> float:
        """Of all bytes at once, as a multiple of inputs, outputs and residuals."""
        least = self.argument + self.output
        return (least + self.temp) / (least + self.residuals)


PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "stickbreaking": (
        *(
            Problem("stickbreaking", width, {}, gradients=gradients)
            for width in (64, 128)
            for gradients in (False, True)
        ),
        Problem("stickbreaking", 64, {"tolerance": 1e-3, "remainder": "value"}, groups=4),
        Problem("stickbreaking", 64, {}, documents=True),
        Problem("stickbreaking", 128, {}, documents=True),
    ),
    "gated_linear": (
        Problem("gated_linear", 64, {}),
        *(
            Problem("gated_linear", width, {"decay": decay})
            for decay in ("scalar", "vector")
            for width in (64, 128)
        ),
        Problem("gated_linear", 64, {"decay": "vector"}, gradients=False),
        Problem("gated_linear", 128, {"decay": "scalar"}, documents=True),
        Problem("gated_linear", 64, {"decay": "vector"}, documents=True),
    ),
    "delta_rule": (
        Problem("delta_rule", 64, {}),
        *(Problem("delta_rule", width, {"decay": "scalar"}) for width in (64, 128)),
        Problem("delta_rule", 64, {"decay": "scalar"}, documents=True),
    ),
}


def prove(problem: Problem) -> Program:
    """Compiles one program."""
    mesh = _mesh()
    place = NamedSharding(mesh, PartitionSpec())
    op = dispatch.get(problem.op)
    sizes = SHAPE | {"G": problem.groups, "K": problem.width, "V": problem.width}

    def array(letters: str, dtype: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(sizes[letter] for letter in letters.split())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    needed = op.needed({**op.options, **problem.options}).items()
    given = {name: spec for name, spec in needed if spec.fill is None}
    inputs = {name: array(spec.letters, problem.dtype) for name, spec in given.items()}
    ids = array("B T", jnp.int32) if problem.documents else None
    d_out = array(op.out, problem.dtype)

    def forward(inputs: Any, ids: Any) -> jax.Array:
        call = {"form": problem.form, "options": problem.options, "mesh": mesh}
        return dispatch.apply(problem.op, inputs, segment_ids=ids, **call)[0]

    def both(inputs: Any, ids: Any, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda inputs: forward(inputs, ids), inputs)
        return out, pull(d_out)[0]

    run, args = (both, (inputs, ids, d_out)) if problem.gradients else (forward, (inputs, ids))
    with _watched() as made:
        memory = jax.jit(run).lower(*args).compile().memory_analysis()
    assert memory is not None
    return Program(
        problem.name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        _residuals(forward, inputs, ids) if problem.gradients else 0,
        tuple(_assemble(result) for result in made),
    )


def _mesh() -> Mesh:
    target = targets.parse("h100-1")
    targets.start(target)
    return Mesh(np.array(targets.devices(target)), ("data",), axis_types=(AxisType.Auto,))


def _residuals(forward: Any, inputs: Any, ids: Any) -> int:
    """Bytes that the backward pass is given and that are neither inputs nor outputs."""

    def kept(inputs: Any, ids: Any) -> Any:
        out, pull = jax.vjp(lambda inputs: forward(inputs, ids), inputs)
        return [out, *jax.tree.leaves(pull)]

    made = jax.make_jaxpr(kept)(inputs, ids).jaxpr
    out, *saved = made.outvars
    own: dict[int, Any] = {id(x): x.aval for x in saved if x is not out and x not in made.invars}
    return sum(aval.size * aval.dtype.itemsize for aval in own.values())


@contextlib.contextmanager
def _watched() -> Iterator[list[Any]]:
    """PTX and shared memory of every kernel that jax-triton makes in the meantime."""
    from jax_triton import triton_lib

    made: list[Any] = []
    compile_ttir = triton_lib.compile_ttir_inplace

    def watch(*args: Any) -> Any:
        made.append(compile_ttir(*args))
        return made[-1]

    with (
        mock.patch.object(triton_lib, "compile_ttir_inplace", watch),
        mock.patch.object(triton_lib, "_COMPILED_KERNEL_CACHE", {}),  # all of them anew
    ):
        yield made


def _assemble(result: Any) -> Kernel:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(result.binary)
        command = [knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(source), "-o", os.devnull]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    count = lambda pattern: sum(int(x) for x in re.findall(pattern, told))
    return Kernel(
        result.name,
        result.binary.count("wgmma.mma_async"),
        count(r"Used (\d+) registers"),
        count(r"(\d+) bytes spill stores"),
        result.shared_mem_bytes,
    )


def proofs(op: str) -> Iterator[Program]:
    """Of all problems of an op, from a process of its own."""
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot.triton_proof", op]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        yield Program(**found | {"kernels": tuple(Kernel(**x) for x in found["kernels"])})


def main() -> None:
    for op in sys.argv[1:] or PROBLEMS:
        for problem in PROBLEMS[op]:
            found = prove(problem)
            kernels = [kernel._asdict() for kernel in found.kernels]
            print(json.dumps(found._asdict() | {"kernels": kernels}), flush=True)


if __name__ == "__main__":
    main()
