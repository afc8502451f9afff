"""Trains every cell of a grid, for one table and one page.

`espalier sweep --config=quickstart --workdir=DIR
    --grid=schedule.peak_learning_rate=0.005,0.01,0.02 --grid="run.length=1e6 tokens,2e6 tokens"`

--config names a run, or a file whose get_config returns a sweep (experiments/power_transfer). If
the schedule has a stable phase, cells that differ only in length are decays of one training. The
same command resumes, and several processes started with one DIR share the work. DIR holds
sweep.jsonl, sweep.parquet, sweep.html and cells/ with a folder for each; the table is written after
every cell.

--table=FILE names the sweep.jsonl of an earlier sweep: its cells are not trained again, and the new
table contains them. --draw_only writes the page of that table and trains nothing.
"""

from __future__ import annotations

from absl import flags

from launch import cli, overrides
from lm.mapping import UNFINISHED, UserError

_CONFIG = cli.config_flag(is_required=False, study="lm.studies.sweep:Sweep")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the sweep", required=True)
_GRID = flags.DEFINE_multi_string(
    "grid", [], "KEY=VALUE,VALUE: an axis of the grid; KEY is a key of the configuration, or width"
)
_TABLE = flags.DEFINE_string("table", "", "sweep.jsonl with cells not to repeat")
_MIN_STEPS = flags.DEFINE_integer(
    "min_steps", None, "leave out cells with fewer steps", lower_bound=0
)
_HALVING = flags.DEFINE_integer(
    "halving", None, "keep one in this many learning rates for the next length; 0: all"
)
_DRAW_ONLY = flags.DEFINE_bool("draw_only", False, "draw --table, train nothing")
_DATA_DIR = cli.data_dir_flag()


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    if _DRAW_ONLY.value and not _TABLE.value:
        raise UserError("--draw_only needs --table; name the table to draw")
    if _CONFIG.value is None and not _DRAW_ONLY.value:
        raise UserError("--config is missing; name the file of a run or of a sweep")
    import jax

    from lm.data import prepare
    from lm.report import sweep as page
    from lm.studies import rows, sweep

    asked, given = None, {"min_steps": _MIN_STEPS.value, "halving": _HALVING.value}
    if not _DRAW_ONLY.value:
        axes = overrides.axes("grid", _GRID.value)
        asked = sweep.create(sweep.completed(_CONFIG.value.to_dict(), axes, given))
    table = rows.read(cli.path("table", _TABLE.value)) if _TABLE.value else []
    workdir = cli.workdir(_WORKDIR.value, "sweep")
    found = table
    if asked is not None:
        # Lengths, rates and seeds share their compiled programs, also when a sweep is resumed.
        jax.config.update("jax_compilation_cache_dir", str(workdir / ".compiled"))
        data_dir = prepare.resolve_data_dir(_DATA_DIR.value)
        save = lambda found: rows.write(found, workdir / "sweep.jsonl")
        found = sweep.run(asked, workdir, data_dir, table=table, report=save)
        if found is None:
            print("stopped and saved; the same command resumes")
            return UNFINISHED
        found = rows.merged(found, table)
    if not found:
        raise UserError(f"--table={_TABLE.value} has no rows, so there is nothing to draw")
    page.write(found, workdir / "sweep.html")
    print(page.table(found))
    written = "sweep.html is" if _DRAW_ONLY.value else "sweep.html and sweep.jsonl are"
    print(f"{written} in {workdir}")
    return 0


if __name__ == "__main__":
    cli.run(main)
