"""Kills a run at random moments and proves that it resumes exactly.

`python -m launch.verify_resume` uses a small model on the standard library; arguments after `--`
replace those given to launch.train: `python -m launch.verify_resume --kills=5 --
--config=experiments/quickstart.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags

from launch import cli

_KILLS = flags.DEFINE_integer("kills", 5, "how often the run is killed", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the moments")
_FOLDER = flags.DEFINE_string("folder", "", "where both runs are kept; default a temporary folder")

SMALL = (
    "--config=experiments/base.py",
    "--config.model.width=64",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=32",
    "--config.model.ffn_dim=128",
    "--config.data.context_length=128",
    "--config.data.batch_size=4",
    "--config.run.length=120 steps",
    "--config.schedule.warmup=5000 tokens",
    "--config.checkpoint.every=15 steps",
    "--config.evaluate.every=40 steps",
    "--config.evaluate.max_tokens=4096",
)


def main(argv: list[str]) -> int:
    from lm.studies import resume

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary).expanduser().absolute()
        found = resume.verify(argv[1:] or SMALL, folder, kills=_KILLS.value, seed=_SEED.value)
    print(f"killed at steps {', '.join(map(str, found.kills))} of {found.steps}")
    for line in found.differences:
        print(f"differs: {line}")
    if not found.differences:
        print("equal: final parameters and optimizer state, and every record, bit for bit; twice")
    return 1 if found.differences else 0


if __name__ == "__main__":
    cli.run(main, positional=True)
