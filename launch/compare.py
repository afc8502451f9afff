"""Trains patterns of mixers at equal parameters on the same text, asks all the same tasks, times
them, and says which is better with what certainty.

`python -m launch.compare --config=experiments/mixers/config.py --workdir=DIR`; the same command
resumes it. DIR holds a run folder for each pattern and seed, compare.json, compare.md, compare.html
and the figures.

Tasks are those of the configuration's `tasks`; --task=TASK adds another (lm/evals) with its
defaults, --task=LABEL.OPTION=VALUE sets an option of it or of one that is there.
"""

from __future__ import annotations

from absl import flags

from launch import cli

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of all the runs", required=True)
_TASK = flags.DEFINE_multi_string("task", [], "TASK or LABEL.OPTION=VALUE; may be repeated")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "prepared data; default $ESPALIER_DATA, else the user's cache"
)


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    asked = cli.tasks(_TASK.value)
    import jax

    from launch.benchmarks import machine
    from lm.data import prepare
    from lm.studies import compare

    values = _CONFIG.value.to_dict()
    for label, options in asked.items():
        values["tasks"][label] = values["tasks"].get(label, {}) | options
    study = compare.create(values)
    workdir = cli.path("workdir", _WORKDIR.value)
    # Seeds of a pattern, and a study that is resumed, compile to the same programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / ".compiled"))
    rows = compare.run(study, workdir, prepare.resolve_data_dir(_DATA_DIR.value))
    recalls = None if rows is None else compare.recalled(study, workdir)
    if rows is None or recalls is None:
        print("stopped and saved; the same command goes on")
        return 1
    compare.write(study, rows, recalls, machine.describe("launch.compare"), workdir)
    print((workdir / "compare.md").read_text(encoding="utf-8"))
    print(f"compare.html, compare.json and the figures are in {workdir}")
    return 0


if __name__ == "__main__":
    cli.run(main)
