"""The memory and modelled time of every kernel, compiled for absent devices (v5e, v5p, H100).

    python -m launch.benchmarks.compiled OP TARGET        prints a line of JSON for each program

A program is `dispatch.apply` of an op in the form written for the device, alone or with its
gradients, on 8,192 tokens in bfloat16. The compiler reports its bytes of device memory, and for
every kernel the on-chip memory. On a GPU, ptxas adds the registers of a thread and the bytes it
spills, and the PTX shows how many products are wgmma. `kept` is what the forward pass saves for the
backward pass beyond the output and the size of the inputs. Seconds come from a model: the larger of
`Op.flops` over peak and `Op.bytes` over bandwidth. Needs the extra `aot`. Each op and target gets a
process of its own, since a process makes a kernel only once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.table import Table

from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import forms, tables
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm import files, targets
from lm.config import UserError
from lm.targets import Chip

TARGETS = ("v5e-1", "v5p-8", "h100-1")
TIME = 8192
GOAL = Goal("<=", 1.5)  # peak bytes over inputs + outputs + kept
PASSES = ("forward", "both")
# Further problems: skipping, the rest of the stick added to the output, and shared key heads.
EXTRA = {"stickbreaking": ({"tolerance": 1e-3, "remainder": "value"}, 64, 2)}


class Problem(NamedTuple):
    """One program to compile: a case of an op, forward or with gradients."""

    op: str
    case: Case
    passes: str

    @property
    def name(self) -> str:
        dims = self.case.dims
        parts = [f"K{dims['K']}", *([f"G{dims['G']}"] if dims["G"] != dims["H"] else [])]
        parts += [f"{key}={value}" for key, value in self.case.options.items()]
        parts += [self.case.documents] if self.case.documents != "none" else []
        return f"{self.op} {' '.join(parts)}/{self.passes}"


class Kernel(NamedTuple):
    """One kernel. `memory`: bytes of VMEM or shared memory that one of its programs takes. The
    other fields are None on a TPU.
    """

    name: str
    memory: int | None
    registers: int | None = None
    spilled: int | None = None
    wgmma: int | None = None


class Program(NamedTuple):
    """A compiled program: its bytes by the compiler, the bytes kept for the backward pass, modelled
    seconds, and its kernels.
    """

    name: str
    argument: int
    output: int
    temp: int
    kept: int
    seconds: float
    kernels: tuple[Kernel, ...]

    @property
    def peak(self) -> float:
        """The most bytes held at once, as a multiple of inputs + outputs + kept."""
        least = self.argument + self.output
        return (least + self.temp) / (least + self.kept)


def run(options: Options) -> Iterator[Result]:
    """Raises:
    UserError: a compiler is not installed, or fails.
    """
    del options
    for target in TARGETS:
        for op in ops(target):
            for program in programs(op, target):
                yield _result(target, op, program)


def table(results: list[Result]) -> Table:
    """A table with a row for each program."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("program", *tables.PROGRAM):
        table.add_column(column, overflow="fold")
    for result in results:
        mapping = result.to_mapping()
        op, passes = result.facts["op"], result.facts["name"].split("/")[1]
        table.add_row(f"{op} {passes}", *next(tables.programs([mapping], (passes,))))
    return table


def ops(target: str) -> list[str]:
    """The ops that have a kernel for this target."""
    platform = targets.parse(target).chip.platform
    return [name for name in dispatch.names() if forms.kernel(name, platform)]


def problems(op: str) -> Iterator[Problem]:
    """Every setting at every width, forward and with gradients; the last setting on packed rows;
    and the problems of EXTRA.
    """
    cases = [case for _, case in forms.problems([op], lengths=(TIME,))]
    for case in cases:
        for passes in PASSES:
            yield Problem(op, case, passes)
    last = cases[-1].options
    for case in cases:
        if case.options == last:
            yield Problem(op, dataclasses.replace(case, documents="packed"), "both")
    if op in EXTRA:
        settings, width, groups = EXTRA[op]
        dims = {**cases[0].dims, "G": groups, "K": width, "V": width}
        yield Problem(op, Case(dims, settings, dtype="bfloat16"), "both")


def programs(op: str, target: str) -> Iterator[Program]:
    """The programs of all problems of an op, compiled in another process.

    Raises:
      UserError: that process fails.
    """
    command = [sys.executable, "-m", "launch.benchmarks.compiled", op, target]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = files.last_line(done.stderr, "no message")
        raise UserError(f"the kernels of {op} for {target} were not compiled: {reason}")
    for line in done.stdout.splitlines():
        found = json.loads(line)
        yield Program(**found | {"kernels": tuple(Kernel(**x) for x in found["kernels"])})


def environment() -> dict[str, str]:
    """The environment of a process in which Triton compiles, even if this one interprets."""
    return {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}


def prove(problem: Problem, chip: Chip, place: Any) -> Program:
    """Compiles one program for `place`, one device of a target."""
    name, case, which = problem
    mesh, form = forms.mesh(place), forms.kernel(name, chip.platform)
    assert form is not None
    inputs, d_out = jax.eval_shape(lambda: forms.arrays(name, case))
    shape = case.dims["B"], case.dims["T"]
    ids = None if case.documents == "none" else jax.ShapeDtypeStruct(shape, jnp.int32)

    def run(which: str, inputs: Any, ids: Any, d_out: Any) -> Any:
        return forms.passes(name, case, form, None, mesh, ids)[which](inputs, d_out)

    is_gpu = chip.platform == "gpu"
    with _triton() if is_gpu else contextlib.nullcontext([]) as made:
        compiled = forms.lower(partial(run, which), (inputs, ids, d_out), mesh).compile()
    memory = compiled.memory_analysis()
    forward = lambda inputs, ids: run("forward", inputs, ids, None)
    return Program(
        problem.name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        _kept(forward, inputs, ids) if which == "both" else 0,
        _seconds(name, case, which, chip),
        tuple(_assemble(result) for result in made) if is_gpu else _on_tpu(compiled.as_text()),
    )


def _kept(forward: Any, inputs: Any, ids: Any) -> int:
    """Bytes saved for the backward pass beyond the output and the size of the inputs. The size is
    subtracted and not the arrays themselves, since a kernel may save its inputs in another layout
    or with non-finite values replaced.
    """

    def run(inputs: Any, ids: Any) -> Any:
        out, pull = jax.vjp(lambda inputs: forward(inputs, ids), inputs)
        return [out, *jax.tree.leaves(pull)]

    out, *saved = jax.make_jaxpr(run)(inputs, ids).jaxpr.outvars
    kept: dict[int, Any] = {id(x): x.aval for x in saved if x is not out}
    size = lambda arrays: sum(x.size * x.dtype.itemsize for x in arrays)
    return max(0, size(kept.values()) - size(jax.tree.leaves(inputs)))


def _seconds(name: str, case: Case, which: str, chip: Chip) -> float:
    peak, bandwidth = chip.peak_flops("bfloat16"), chip.hbm_bandwidth
    assert peak is not None
    assert bandwidth is not None
    work = forms.work(name, case, which)
    return max(work.flops / peak, work.bytes / bandwidth)


def _on_tpu(text: str) -> tuple[Kernel, ...]:
    """The kernels of a compiled TPU program, with the VMEM that the compiler gave them."""
    found: list[Kernel] = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            # The name that a library gave its kernel, else that of the instruction.
            name = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call"', line) or re.match(
                r"\s*(?:ROOT )?%(\S+) =", line
            )
            used = re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)
            assert name is not None
            found.append(Kernel(name[1], int(used[1]) if used else None))
    return tuple(found)


@contextlib.contextmanager
def _triton() -> Iterator[list[Any]]:
    """Collects the PTX and shared memory of every kernel that jax-triton compiles in the body."""
    from jax_triton import triton_lib

    made: list[Any] = []
    compile_ttir = triton_lib.compile_ttir_inplace

    def watch(*args: Any) -> Any:
        made.append(compile_ttir(*args))
        return made[-1]

    with (
        mock.patch.object(triton_lib, "compile_ttir_inplace", watch),
        mock.patch.object(triton_lib, "_COMPILED_KERNEL_CACHE", {}),  # compile all anew
    ):
        yield made


def _assemble(result: Any) -> Kernel:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(result.binary)
        command = [knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(source), "-o", os.devnull]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    count = lambda pattern: sum(int(x) for x in re.findall(pattern, output))
    return Kernel(
        result.name,
        result.shared_mem_bytes,
        count(r"Used (\d+) registers"),
        count(r"(\d+) bytes spill stores"),
        result.binary.count("wgmma.mma_async"),
    )


def _result(target: str, op: str, program: Program) -> Result:
    facts = program._asdict() | {
        "target": target,
        "op": op,
        "kernels": [kernel._asdict() for kernel in program.kernels],
    }
    return Result(
        name=f"compiled/{target}/{program.name}", value=program.peak, goal=GOAL, facts=facts
    )


def main() -> None:
    op, target = sys.argv[1], targets.parse(sys.argv[2])
    targets.start(target)
    try:
        place = targets.devices(target)[0]
    except UserError as error:
        raise SystemExit(str(error)) from None
    for problem in problems(op):
        found = prove(problem, target.chip, place)
        kernels = [kernel._asdict() for kernel in found.kernels]
        print(json.dumps(found._asdict() | {"kernels": kernels}), flush=True)


if __name__ == "__main__":
    main()
