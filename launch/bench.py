"""Measures speed, memory and compile time against our goals.

    espalier bench [--cases=train_step,ops] [--pairs=40] [--out=results/bench/cpu.json]

--help says what each case measures. A case that needs another device is refused.
"""

from __future__ import annotations

import importlib
import json
import typing
from typing import Any

from absl import flags
from rich.console import Console

from launch import benchmarks, cli, presets
from lm.config import ModelConfig, UserError, nearest

PRECISIONS = typing.get_args(typing.get_type_hints(ModelConfig)["precision"])

_CASES = flags.DEFINE_list("cases", [*benchmarks.DEFAULT], f"of these:\n{benchmarks.listing()}\n")
_OUT = flags.DEFINE_string("out", "", "JSON file to write; FILE.partial until the end")
_PAIRS = flags.DEFINE_integer("pairs", 40, "samples of each side", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", "the trained run for skipping")
_PEER_PYTHON = flags.DEFINE_string("peer_python", "", "Python that runs peers; default: this one")
_PRECISION = flags.DEFINE_enum("precision", "float32", PRECISIONS, "for steps and recurrences")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    known = benchmarks.names()
    for name in _CASES.value or [""]:
        if name not in known:
            raise UserError(f"--cases: no case {name!r}; {nearest(name, known)}")
    out = cli.out_file("out", _OUT.value)
    partial = out.with_name(f"{out.name}.partial") if out else None  # rows so far
    import jax  # only after the flags have been checked

    from launch.benchmarks import machine, problem, timing
    from lm import files
    from lm.run.progress import Waiting

    jax.config.update("jax_enable_compilation_cache", False)  # so that compile times are real
    settings = {"pairs": _PAIRS.value, "precision": _PRECISION.value}
    base = cli.read_config_file(presets.BASE).to_dict()
    others = {"workdir": _WORKDIR.value, "peer_python": _PEER_PYTHON.value}
    options = problem.Options(base=base, **others, **settings)
    head = machine.describe("bench") | settings
    console, results = Console(highlight=False, markup=False), list[Any]()
    cases = {n: importlib.import_module(f"launch.benchmarks.{n}") for n in _CASES.value}
    for case in cases.values():
        getattr(case, "check", lambda options: None)(options)  # before any case starts
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
