"""Measures speed, memory and compile time against our goals.

    espalier bench [--cases=train_step,ops] [--pairs=40] [--out=results/bench/cpu.json]

train_step: against the same step written by hand. matmul_fraction: share of the machine's matmul
rate. ops: our two forms of attention and jax.nn's. recurrences: every op beside softmax, and how
recurrent ones grow. memory: largest arrays. compile: 24 layers, or 2. decode: a token against the
state's length. evaluation: its share of a run. Only if named: schedules (share of a step), kernels
(of a GPU or TPU, beside softmax's, chunked and the device's ceilings), peers (beside
flash-linear-attention's and the stick-breaking authors'), skipping (stick-breaking with a tolerance
on the data of --workdir), meshes (formulas and the TPU compiler), compiled (what compilers make of
kernels for absent devices), sequence (a time axis split over eight devices: bytes and collectives
beside those declared, a layer's memory).
"""

from __future__ import annotations

import importlib
import json
import typing
from typing import Any

from absl import flags
from rich.console import Console

from launch import cli, presets
from lm.config import ModelConfig, UserError, nearest

NAMES = "train_step matmul_fraction ops recurrences memory compile decode evaluation"
DEFAULT = tuple(NAMES.split())
CASES = (*DEFAULT, "schedules", "peers", "skipping", "meshes", "kernels", "compiled", "sequence")
PRECISIONS = typing.get_args(typing.get_type_hints(ModelConfig)["precision"])

_CASES = flags.DEFINE_list("cases", list(DEFAULT), f"of {', '.join(CASES)}")
_OUT = flags.DEFINE_string("out", "", "JSON file to write; until the end FILE.partial")
_PAIRS = flags.DEFINE_integer("pairs", 40, "samples of each side", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", "trained run that skipping reads")
_PRECISION = flags.DEFINE_enum("precision", "float32", PRECISIONS, "of steps and recurrences")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    for name in _CASES.value or [""]:
        if name not in CASES:
            raise UserError(f"--cases: no case {name!r}; {nearest(name, CASES)}")
    out = cli.out_file("out", _OUT.value)
    partial = out.with_name(f"{out.name}.partial") if out else None  # rows as they come
    import jax  # only after the flags have been checked

    from launch.benchmarks import machine, problem, timing
    from lm import files
    from lm.run.progress import Waiting

    jax.config.update("jax_enable_compilation_cache", False)  # so that compile times are real
    settings = {"pairs": _PAIRS.value, "precision": _PRECISION.value}
    base = cli.read_config_file(presets.BASE).to_dict()
    options = problem.Options(base=base, workdir=_WORKDIR.value, **settings)
    head = machine.describe("bench") | settings
    console, results = Console(highlight=False, markup=False), list[Any]()
    cases = {n: importlib.import_module(f"launch.benchmarks.{n}") for n in _CASES.value}
    for case in cases.values():
        getattr(case, "check", lambda options: None)(options)  # before any of them takes its time
    for name, case in cases.items():
        first = len(results)
        with Waiting(name) as waiting:
            for result in case.run(options):
                waiting.show(result.name)
                results.append(result)
                if partial is not None:
                    rows = [row.to_mapping() for row in results]
                    files.replace(partial, json.dumps(head | {"results": rows}, indent=1) + "\n")
        console.print(getattr(case, "table", timing.table)(results[first:]))
    if out is not None and partial is not None:
        partial.replace(out)


if __name__ == "__main__":
    cli.run(main)
