"""Checks that two runs have the same curves.

    espalier same_curve A B [--tolerance=1e-4] [--metrics=train/loss,eval/] [--out=FILE]

For every metric in the records of both runs, except times and token counts, it prints the largest
difference at one step, relative to the larger value. Exit status 1 if the difference of a metric in
--metrics exceeds the tolerance. --out writes those metrics as JSON, with the commands of both runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from launch import cli
from lm.config import UserError

METRICS = ("train/loss", "eval/")

_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "relative", lower_bound=0.0)
_METRICS = flags.DEFINE_list("metrics", list(METRICS), "metrics that must agree, or prefixes")
_OUT = flags.DEFINE_string("out", "", "JSON file to write")


def main(argv: list[str]) -> int:
    if len(argv) != 3:
        raise UserError(f"two runs are compared, {len(argv) - 1} were named; name A and B")
    out = cli.out_file("out", _OUT.value)
    from launch.benchmarks import machine
    from lm import files
    from lm.report import folder
    from lm.studies import curves

    one, other = folder.load([Path(path).expanduser() for path in argv[1:]])
    found = curves.differences(one, other)
    judged = {key: x for key, x in found.items() if key.startswith(tuple(_METRICS.value))}
    if not judged:
        raise UserError(f"no step of both runs has {' or '.join(_METRICS.value)}")
    for key, x in found.items():
        print(f"{key}: {x.relative:.2e} at step {x.step} ({x.one:.6g}, {x.other:.6g})")
    worst = max(x.relative for x in judged.values())
    print(f"largest of {', '.join(_METRICS.value)}: {worst:.2e}, tolerance {_TOLERANCE.value:g}")
    if out is not None:
        values = machine.describe("same_curve") | curves.summary(one, other, judged)
        commands = [machine.command(run.flags()) for run in (one, other)]
        values |= {"runs": [f"espalier train {words}" for words in commands]}
        files.replace(out, json.dumps(values, indent=2) + "\n")
    return 0 if worst <= _TOLERANCE.value else 1


if __name__ == "__main__":
    cli.run(main, positional=True)
