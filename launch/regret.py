"""Measures how much an untuned schedule loses against tuned ones.

`espalier regret SWEEP.jsonl --untuned=power --tuned_on=0,1 [--out=regret.json]
    [--figure=regret.svg]`

SWEEP.jsonl comes from espalier sweep and has the same budgets (width, batch, tokens) for several
schedules. --untuned keeps one setting at every budget. The learning rate of every other schedule is
tuned at each budget on the seeds of --tuned_on; the losses are compared on at least four other
seeds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from absl import flags

from launch import cli
from lm.mapping import UserError

_UNTUNED = flags.DEFINE_string("untuned", "power", "the schedule that keeps one setting")
_TUNED_ON = flags.DEFINE_list("tuned_on", ["0", "1"], "seeds that tune the other schedules")
_OUT = flags.DEFINE_string("out", "", "JSON file for the regrets")
_FIGURE = flags.DEFINE_string("figure", "", "SVG file for their figure")


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        raise UserError("which table? name one: espalier regret SWEEP.jsonl")
    if not all(re.fullmatch(r"[0-9]+", x.strip()) for x in _TUNED_ON.value or [""]):
        raise UserError(f"--tuned_on={','.join(_TUNED_ON.value)} is not a list of seeds, as 0,1")
    out, figure = (cli.out_file(n, f.value) for n, f in (("out", _OUT), ("figure", _FIGURE)))
    cli.check_suffix("figure", figure, ".svg")
    from launch.benchmarks import machine
    from lm import files
    from lm.report import regret as page
    from lm.studies import regret, rows

    table = rows.read(Path(argv[1]).expanduser())
    found = regret.regrets(table, _UNTUNED.value, [int(seed) for seed in _TUNED_ON.value])
    plain = regret.plain(found)
    print(page.table(plain))
    if out is not None:
        values = machine.describe("regret") | {"regrets": plain}
        files.replace(out, json.dumps(values, indent=1, allow_nan=False) + "\n")
    if figure is not None:
        from lm.report.figures import standalone

        files.replace(figure, standalone(page.figure(plain, _UNTUNED.value)))
    return 0


if __name__ == "__main__":
    cli.run(main, positional=True)
