"""Checks that wider or deeper models keep the size of activations.

`espalier coord_check --config=coord_check --widths=64,128,256,512
    --workdir=DIR`, or --depths=2,4,8,16 in place of widths; --mixer names patterns, one a flag.

Trains a few steps at every size and seed, and fits the slope of log |activation| against log width
for every probe and step. Under muP (over depth: CompleteP) every slope must lie within 0.1 of 0;
the slope of the logits is checked only in the second half of the steps. Under the standard
parametrization (over depth: muP) some slope must exceed 0.3, otherwise the check could not detect a
fault. DIR holds coord_check.json, coord_check.md, slopes.svg and curves.svg. Exit status 0 if all
of this holds, else 1.

--table=FILE names the coord_check.json of an earlier check. Trainings in it or in DIR are not
repeated.
"""

from __future__ import annotations

from absl import flags

from launch import cli
from lm.mapping import UserError

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of table and figures", required=True)
_MIXER = flags.DEFINE_multi_string("mixer", [], "a pattern to check; default: the config's")
_WIDTHS = flags.DEFINE_list("widths", [], "model widths; heads keep their width")
_DEPTHS = flags.DEFINE_list("depths", [], "numbers of layers, instead of widths")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "seeds of parameters and data")
_STEPS = flags.DEFINE_integer("steps", 10, "optimizer steps")
_PARAMETRIZATION = flags.DEFINE_enum(
    "parametrization", "both", ["both", "mup", "standard", "completep"], "which to train"
)
_TABLE = flags.DEFINE_string("table", "", "coord_check.json with trainings not to repeat")
_DATA_DIR = cli.data_dir_flag()


def _whole(flag: str, values: list[str]) -> list[int]:
    if bad := [value for value in values if not value.strip().isdecimal()]:
        raise UserError(f"--{flag}: {bad[0]!r} is not a whole number; write for example 64,128")
    return [int(value) for value in values]


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    from launch.benchmarks import machine
    from lm.data import prepare
    from lm.report import coord_check as page
    from lm.run.progress import GridBar
    from lm.studies import coord_check

    sizes = {flag.name: _whole(flag.name, flag.value) for flag in (_WIDTHS, _DEPTHS, _SEEDS)}
    asked = coord_check.Asked(_MIXER.value, _PARAMETRIZATION.value, **sizes, steps=_STEPS.value)
    check = coord_check.create(cli.load_config(_CONFIG.value), asked)
    workdir = cli.workdir(_WORKDIR.value, "coord_check")
    tables = [cli.path("table", _TABLE.value)] if _TABLE.value else []
    tables += [path for path in [workdir / "coord_check.json"] if path.exists()]
    earlier = [curve for path in tables for curve in coord_check.read(path)]
    data = prepare.prepare(check.run.data, prepare.resolve_data_dir(_DATA_DIR.value))
    head = machine.describe("coord_check")
    with GridBar(len(check.cells)) as bar:

        def save(cell: coord_check.Cell, curves: list[page.Curve]) -> None:
            coord_check.save(curves, head, workdir)
            bar.update(" ".join(map(str, cell)), check.steps, "done")
            bar.update("", 0, "")

        curves = coord_check.run(check, data, earlier, save)
    coord_check.write(curves, head, workdir)
    print(page.table(curves))
    return 0 if all(verdict.holds for verdict in page.verdicts(curves)) else 1


if __name__ == "__main__":
    cli.run(main)
