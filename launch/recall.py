"""Trains mixers on associative recall: accuracy against state.

The task is multi-query associative recall: many keys and values in one row.

`espalier recall --config=recall:cpu --workdir=DIR`; the same command resumes, and several processes
started with one DIR share the trainings. DIR holds points/ with a run folder for each training,
recall.json, recall.md and recall.svg.

--table=FILE names the recall.json of an earlier study. Trainings in it with the same configuration
are not repeated, and become part of the new recall.json.
"""

from __future__ import annotations

from absl import flags

from launch import cli
from lm.mapping import UNFINISHED

_CONFIG = cli.config_flag(study="lm.studies.recall:Study")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the study", required=True)
_TABLE = flags.DEFINE_string("table", "", "recall.json with trainings not to repeat")


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    import jax

    from launch.benchmarks import machine
    from lm.studies import grid, recall

    study = recall.create(cli.study_values(_CONFIG.value))
    workdir = cli.workdir(_WORKDIR.value, "recall")
    table = _TABLE.value and grid.read_table(cli.path("table", _TABLE.value), recall.Outcome)
    # The seeds of a pattern and width share their compiled programs, also in a resumed study.
    jax.config.update("jax_compilation_cache_dir", str(workdir / ".compiled"))
    trainings = recall.create_grid(study, workdir, table or ())
    found = recall.run(study, trainings)
    if found is None:
        print("stopped and saved; the same command resumes")
        return UNFINISHED
    head = machine.describe("recall")
    recall.write(recall.rows(study, found), grid.entries(trainings, found), head, workdir)
    print((workdir / "recall.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    cli.run(main)
