"""Trains mixers on the same text and says which is better.

    espalier compare --config=mixers --workdir=DIR      the same command resumes it

All models have the same number of parameters, do the same tasks and are timed. DIR holds a run
folder for each pattern and seed, compare.json, compare.md, compare.html and the figures. Tasks are
the configuration's `tasks`; --task=TASK adds another (lm/evals), and --task=LABEL.OPTION=VALUE sets
an option. Runs in --table=FILE, the compare.json of an earlier study, are not trained again.
--recheck=FILE trains nothing: it recomputes the verdicts from the numbers of that compare.json and
prints whether each still holds; with --config, for the primary comparisons of that study. Exit
status 1 if one does not hold.
"""

from __future__ import annotations

from absl import flags

from launch import cli, members, result
from lm.mapping import UNFINISHED, UserError

_CONFIG = cli.config_flag(is_required=False, study="lm.studies.study:Study")
_WORKDIR = flags.DEFINE_string("workdir", "", "folder of all the runs")
_TASK = flags.DEFINE_multi_string("task", [], "TASK or LABEL.OPTION=VALUE; may be repeated")
_TABLE = flags.DEFINE_string("table", "", "compare.json with runs not to repeat")
result.flag()
_RECHECK = flags.DEFINE_string("recheck", "", "compare.json whose verdicts to recompute")
_DATA_DIR = cli.data_dir_flag()


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    asked = members.tasks(_TASK.value)
    if _CONFIG.value is None and (asked or not _RECHECK.value):
        raise UserError("--config is missing; name the file of a study")
    import jax

    from launch.benchmarks import machine
    from lm import files
    from lm.data import prepare
    from lm.report import compared, verdicts
    from lm.studies import compare, verdict
    from lm.studies import study as study_lib

    values = cli.study_values(_CONFIG.value) if _CONFIG.value is not None else {}
    tasks = values.get("tasks", {})
    values |= {"tasks": tasks | {x: tasks.get(x, {}) | asked[x] for x in asked}} if asked else {}
    study = study_lib.create(values) if values else None
    if _RECHECK.value:
        page = compared.load(cli.path("recheck", _RECHECK.value))
        lines, all_stand = verdict.recheck(page, study.primary if study else ())
        result.give({"verdicts": lines, "all_stand": all_stand})
        print("\n".join(lines))
        return int(not all_stand)
    assert study is not None
    workdir = cli.workdir(_WORKDIR.value, "compare")
    before = compared.load(cli.path("table", _TABLE.value)) if _TABLE.value else None
    # The seeds of a pattern share their compiled programs, also when a study is resumed.
    jax.config.update("jax_compilation_cache_dir", str(workdir / ".compiled"))
    head = machine.describe("compare")
    rows = compare.run(
        study,
        workdir,
        prepare.resolve_data_dir(_DATA_DIR.value),
        table=compare.cells(before) if before else (),
        report=lambda rows: compare.write(study, rows, (), head, workdir),
    )
    if rows is None or (recalls := compare.recalled(study, workdir, before)) is None:
        result.give({"finished": False})
        print("stopped and saved; the same command resumes")
        return UNFINISHED
    compare.write(study, rows, recalls, machine.describe("compare"), workdir)
    result.give({"finished": True} | files.read_json(workdir / "compare.json", "remove it"))
    page = compared.load(workdir / "compare.json")
    print("\n".join(x.sentence for x in page.verdicts) or verdicts.NO_PRIMARY)
    print(f"tables: {workdir / 'compare.md'}\npage: {workdir / 'compare.html'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
