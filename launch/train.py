"""Trains a model: `espalier train --config=quickstart --workdir=runs/quickstart`.

Several processes can train one model: start the same command in each, on a TPU pod or under Slurm
with `--processes=auto`, elsewhere with `--coordinator=HOST:PORT --num_processes=N --process_id=I`.

Exit status: 0 finished; 75 not finished, and the same command resumes it (a signal arrived and the
run was saved, or one of several processes was lost); 2 a mistake; 130 interrupted before step 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import cli, shell
from lm.mapping import UNFINISHED

if TYPE_CHECKING:
    from lm.train import Outcome

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; the same folder resumes it", required=True
)
_DATA_DIR = cli.data_dir_flag()
_PROFILE = flags.DEFINE_integer("profile_steps", 0, "traced into WORKDIR/profile", lower_bound=0)
_ACCEPT_LOST = flags.DEFINE_bool("accept_lost_records", False, "resume without lost metric records")
_SUGGEST = flags.DEFINE_bool("suggest", False, "print at the end which commands to try next")
_PROCESSES = flags.DEFINE_enum("processes", "one", ["one", "auto"], "auto: from the pod or job")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens on")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the run", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "this process, from 0", lower_bound=0)
_PATIENCE = flags.DEFINE_float(
    "patience", 30.0, "seconds of silence after which a process counts as lost", lower_bound=3
)


def main(argv: list[str]) -> int:
    config = cli.load_config(_CONFIG.value)
    from lm import train  # after the config is known to be right: this imports jax
    from lm.data import prepare
    from lm.parallel import processes
    from lm.run import compiled

    options = train.Options(
        workdir=cli.path("workdir", _WORKDIR.value),
        data_dir=prepare.resolve_data_dir(_DATA_DIR.value),
        profile_steps=_PROFILE.value,
        accept_lost_records=_ACCEPT_LOST.value,
    )
    compiled.keep(options.data_dir, is_wanted=config.run.keep_compiled)
    start = processes.choose(
        _PROCESSES.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    with processes.joined(start, _PATIENCE.value):
        outcome = train.run(config, options)
        if processes.is_first():
            show(outcome, options.workdir)
    return 0 if outcome.finished else UNFINISHED


def show(outcome: Outcome, workdir: Path) -> None:
    if not outcome.finished:
        again = shell.line("train", sys.argv[1:])
        print(f"stopped at step {outcome.step}, saved; resume with: {again}")
        return
    for name, bits in outcome.evaluation.items():
        print(f"validation {name}: {bits:.4f} bits per byte")
    for sample in outcome.samples:
        print(f"\n--- {sample['kind']} ---\n{sample['prompt']}{sample['text']}")
    print(f"\nreport: {outcome.report}")
    if _SUGGEST.value:
        print(f"\n{shell.next_lines(workdir, cli.config_words())}")


if __name__ == "__main__":
    cli.run(main)
