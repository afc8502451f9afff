"""Kills a run at random moments and proves that it resumes.

`espalier verify_resume` trains a small model on the text of Python's standard library. Arguments
after `--` replace those given to espalier train: `espalier verify_resume --kills=5 --
--config=quickstart`. With --processes=N, N processes train one model and one of them is killed at
a time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags

from launch import cli

_KILLS = flags.DEFINE_integer("kills", 5, "number of times to kill the run", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "processes that train the model", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random moments")
_FOLDER = flags.DEFINE_string("folder", "", "folder for both runs; default: a temporary one")

SMALL = (
    "--config=base",
    "--config.model.width=64",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=32",
    "--config.model.ffn_dim=128",
    "--config.data.tokenizer.kind=bytes",
    "--config.data.tokenizer.vocab_size=257",
    "--config.data.context_length=128",
    "--config.data.batch_size=4",
    "--config.schedule.warmup=5000 tokens",
    "--config.checkpoint.every=15 steps",
    "--config.evaluate.every=40 steps",
    "--config.evaluate.max_tokens=4096",
    "--config.log.samples=()",
)


def main(argv: list[str]) -> int:
    from lm.studies import resume

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary).expanduser().absolute()
        # Long enough that all kills hit a running process: about one in three leaves a checkpoint.
        small = (*SMALL, f"--config.run.length={max(120, 12 * _KILLS.value)} steps")
        found = resume.verify(
            argv[1:] or small,
            folder,
            kills=_KILLS.value,
            seed=_SEED.value,
            processes=_PROCESSES.value,
        )
    print(f"killed at steps {', '.join(str(kill.step) for kill in found.kills)} of {found.steps}")
    print(f"killed {resume.by_place(found.kills)}; processes: {_PROCESSES.value}")
    for line in found.differences:
        print(f"differs: {line}")
    if not found.differences:
        print("equal: final parameters and optimizer state, and every record, bit for bit; twice")
    return 1 if found.differences else 0


if __name__ == "__main__":
    cli.run(main, positional=True)
