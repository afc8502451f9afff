"""Measures speed, memory and compile time against the goals of the project.

    python -m launch.bench [--cases=train_step,ops] [--pairs=40] [--out=results/bench/cpu.json]

train_step: against the same step by hand. matmul_fraction: of the machine's matmul rate. ops: our
two of attention and jax.nn's. recurrences: every op beside softmax, and how recurrent ones grow.
memory: largest arrays. compile: 24 layers, or 2. decode: a token against the state's length.
evaluation: its share of a run. Named only: peers (flash-linear-attention), skipping (stick-breaking
with a tolerance, on the q, k, v of the run --workdir), meshes (formulas and the TPU compiler),
kernels (those of a GPU or TPU, beside softmax's, the chunked forms and the device's ceilings),
compiled (what compilers make of every kernel for a v5e, a v5p and an H100 that are not here).
"""

from __future__ import annotations

import importlib
import json
import typing
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from launch import cli
from lm.config import ModelConfig, UserError, nearest

NAMES = "train_step matmul_fraction ops recurrences memory compile decode evaluation"
DEFAULT = tuple(NAMES.split())
CASES = (*DEFAULT, "peers", "skipping", "meshes", "kernels", "compiled")
PRECISIONS = typing.get_args(typing.get_type_hints(ModelConfig)["precision"])
BASE = Path(__file__).resolve().parent.parent / "experiments" / "base.py"

_CASES = flags.DEFINE_list("cases", list(DEFAULT), f"of {', '.join(CASES)}")
_OUT = flags.DEFINE_string("out", "", "JSON file to write; its folder is made")
_PAIRS = flags.DEFINE_integer("pairs", 40, "samples of each side", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", "trained run that skipping reads")
_PRECISION = flags.DEFINE_enum("precision", "float32", PRECISIONS, "of steps and recurrences")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    for name in _CASES.value or [""]:
        if name not in CASES:
            raise UserError(f"--cases: no case {name!r}; {nearest(name, CASES)}")
    out = Path(_OUT.value).expanduser() if _OUT.value else None
    if out is not None:
        _make_folder(out)
    import jax  # after the flags are known to be right

    from launch.benchmarks import machine, problem, timing
    from lm import files

    jax.config.update("jax_enable_compilation_cache", False)  # compile times are to be true
    base = cli.read_config_file(str(BASE)).to_dict()
    given = {"pairs": _PAIRS.value, "precision": _PRECISION.value, "workdir": _WORKDIR.value}
    options = problem.Options(base=base, **given)
    head = machine.describe("launch.bench")
    head |= {"pairs": options.pairs, "precision": options.precision}
    console, results = Console(highlight=False, markup=False), list[Any]()
    for name in _CASES.value:
        case = importlib.import_module(f"launch.benchmarks.{name}")
        found = case.run(options)
        console.print(getattr(case, "table", timing.table)(found))
        results += found
        if out is not None:
            found = [result.to_mapping() for result in results]
            files.replace(out, json.dumps(head | {"results": found}, indent=1) + "\n")


def _make_folder(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; choose another file") from None
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name a file")


if __name__ == "__main__":
    cli.run(main)
