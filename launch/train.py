"""Trains a model: `python -m launch.train --config=experiments/quickstart.py
--workdir=runs/quickstart`.
"""

from __future__ import annotations

import shlex
import sys

from absl import flags

from launch import cli

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; the same folder resumes it", required=True
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "prepared data; default $ESPALIER_DATA, else the user's cache"
)
_PROFILE = flags.DEFINE_integer(
    "profile_steps", 0, "steps to trace into WORKDIR/profile", lower_bound=0
)


def main(argv: list[str]) -> None:
    config = cli.load_config(_CONFIG.value)
    from lm import train  # after the config is known to be right: this imports jax
    from lm.data import prepare

    options = train.Options(
        workdir=cli.path("workdir", _WORKDIR.value),
        data_dir=prepare.resolve_data_dir(_DATA_DIR.value),
        profile_steps=_PROFILE.value,
    )
    outcome = train.run(config, options)
    if not outcome.finished:
        command = shlex.join(["python", "-m", "launch.train", *sys.argv[1:]])
        print(f"stopped at step {outcome.step}, saved; resume with: {command}")
        return
    for name, bits in outcome.evaluation.items():
        print(f"validation {name}: {bits:.4f} bits per byte")
    for sample in outcome.samples:
        print(f"\n--- {sample['kind']} ---\n{sample['prompt']}{sample['text']}")
    print(f"\nreport: {outcome.report}")


if __name__ == "__main__":
    cli.run(main)
