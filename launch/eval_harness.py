"""Evaluates a checkpoint on tasks of lm-evaluation-harness.

    espalier eval_harness --checkpoint=WORKDIR --tasks_dir=FOLDER --tasks=NAME,NAME

Needs the extra `eval`. The tasks are the .yaml files of FOLDER; lm/interop/eval_harness.py explains
how to make one local. No code in them runs without --trust_tasks. Without --tasks_dir the tasks are
the harness's own, which load their data from the Hugging Face hub. `--layer` works as in espalier
evaluate, which does not need the harness and reports an interval for every number.
"""

import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli, members
from lm import extras
from lm.config import UserError
from lm.interop import harness_tasks

_LAYER = members.layer_flag()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_TASKS = flags.DEFINE_list("tasks", None, "names of tasks, separated by commas", required=True)
_TASKS_DIR = flags.DEFINE_string("tasks_dir", "", "folder of .yaml files; default: the harness's")
_TRUST = flags.DEFINE_bool("trust_tasks", False, "run the Python that tasks name (!function)")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "most tokens read; 0: the run's", lower_bound=0)
_LIMIT = flags.DEFINE_integer("limit", 0, "documents of each task; 0: all", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file to write")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    path, layers = cli.path("checkpoint", _CHECKPOINT.value), members.layers(_LAYER.value)
    out = cli.out_file("out", _OUT.value)
    folder = Path(_TASKS_DIR.value).expanduser() if _TASKS_DIR.value else None
    if folder and not folder.is_dir():
        raise UserError(f"--tasks_dir={folder} is not a folder")
    if folder and not _TRUST.value:
        harness_tasks.check_is_data(folder)
    # The harness's bootstrap would fork, which can deadlock the threads of JAX.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        from lm_eval import evaluator, tasks, utils  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; {extras.command('eval')}") from None
    from lm import files  # after the flags: imports jax
    from lm.interop import eval_harness
    from lm.run import checkpoint

    if not _TRUST.value:
        eval_harness.confine()

    manager = tasks.TaskManager(
        include_path=str(folder) if folder else None, include_defaults=folder is None
    )
    if missing := [name for name in _TASKS.value if not manager.match_tasks([name])]:
        raise UserError(f"--tasks={missing[0]}: no such task in {folder or 'the harness'}")
    model = eval_harness.EspalierLM(checkpoint.load(path, layers), _MAX_LENGTH.value)
    results: Any = evaluator.simple_evaluate(
        model=model,
        tasks=[*_TASKS.value],
        task_manager=manager,
        limit=_LIMIT.value or None,
        bootstrap_iters=1000,
    )
    print(utils.make_table(results))
    if out:
        found = {name: results[name] for name in ("results", "versions", "n-samples")}
        try:
            files.replace(out, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out={_OUT.value}: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
