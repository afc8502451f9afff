"""Tests whether the best rate of a narrow model suits a wide one.

`espalier lr_transfer --config=lr_transfer:cpu --workdir=DIR`; the same command resumes, and several
processes started with one DIR share the trainings. DIR holds sweep.jsonl, lr_transfer.json,
lr_transfer.md and lr_transfer.svg. Exit status 1 if under muP an optimum moved by more than one
bin, or under the standard parametrization by fewer than two.

--table=FILE names the sweep.jsonl of an earlier study, whose trainings are not repeated.
"""

from __future__ import annotations

import json

from absl import flags

from launch import cli
from lm.mapping import UNFINISHED

_CONFIG = cli.config_flag(study="lm.studies.lr_transfer:Study")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the study", required=True)
_TABLE = flags.DEFINE_string("table", "", "sweep.jsonl with cells not to repeat")
_DATA_DIR = cli.data_dir_flag()


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    import jax

    from launch.benchmarks import machine
    from lm import files
    from lm.data import prepare
    from lm.report import lr_transfer as page
    from lm.report.figures import standalone
    from lm.studies import lr_transfer, rows, sweep

    study = lr_transfer.create(cli.study_values(_CONFIG.value))
    table = rows.read(cli.path("table", _TABLE.value)) if _TABLE.value else []
    workdir = cli.workdir(_WORKDIR.value, "lr_transfer")
    # All rates and seeds share their compiled programs, also when a study is resumed.
    jax.config.update("jax_compilation_cache_dir", str(workdir / ".compiled"))
    found = sweep.run(
        lr_transfer.sweep(study),
        workdir,
        prepare.resolve_data_dir(_DATA_DIR.value),
        table=table,
        report=lambda found: rows.write(found, workdir / "sweep.jsonl"),
    )
    if found is None:
        print("stopped and saved; the same command resumes")
        return UNFINISHED
    judged = lr_transfer.judge(study, found)
    values = machine.describe("lr_transfer") | {"transfers": lr_transfer.plain(judged)}
    files.replace(workdir / "lr_transfer.json", json.dumps(values, indent=1) + "\n")
    files.replace(workdir / "lr_transfer.md", page.table(judged))
    files.replace(workdir / "lr_transfer.svg", standalone(page.figure(judged)))
    print(page.table(judged))
    return int(not judged or not all(one.is_as_expected for one in judged))


if __name__ == "__main__":
    cli.run(main)
