"""Finds the fastest tiles, and where kernels beat chunked forms.

    espalier tune [--ops=stickbreaking,...] [--pairs=20]    measures on the device at hand
    espalier tune --target=v5e-1                            models an absent one by its compiler

Writes kernels/measured/DEVICE.json, which form `auto` and the kernels read; --out names another
file. Rows of ops that are not tuned stay in the file.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from rich.console import Console

from launch import cli
from lm.config import UserError

_TARGET = flags.DEFINE_string("target", "", "absent machine to model: v5e-1, v5p-8, h100-1")
_OPS = flags.DEFINE_list("ops", [], "ops to tune; default: all with a kernel for the device")
_PAIRS = flags.DEFINE_integer("pairs", 20, "samples of each form", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "JSON file to write in place of kernels/measured/DEVICE.json")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    out = cli.out_file("out", _OUT.value)
    from kernels import measured
    from launch.benchmarks import machine, tuning
    from lm import files, targets
    from lm.run.progress import Waiting

    if _TARGET.value:
        target = targets.parse(_TARGET.value)
        targets.start(target)
        place = tuning.Absent(target.chip, targets.devices(target)[0])
    else:
        place = tuning.here(_PAIRS.value)
    names = tuning.names(place, _OPS.value)
    head = machine.describe("tune") | place.head()
    path = Path(out) if out else measured.path(place.device_kind)
    kept = tuning.kept(path, names)
    rows: list[dict[str, object]] = []
    with Waiting(f"kernels of {place.device_kind}") as waiting:
        for row in tuning.rows(place, names, waiting.show):
            rows.append(row)
            files.replace(path, json.dumps(head | {"rows": kept + rows}, indent=1) + "\n")
    if not rows:
        taken = f"no kernel of {', '.join(names)} takes any problem on {place.device_kind}"
        raise UserError(f"{taken}, so nothing was written; name other ops in --ops")
    Console(highlight=False, markup=False).print(tuning.table(rows))
    print(f"written: {path}")


if __name__ == "__main__":
    cli.run(main)
