"""Trains mixers on multi-query associative recall and puts accuracy beside the size of the state.

`python -m launch.recall --config=experiments/recall/config.py:cpu --workdir=DIR`; the same command
resumes it, a training at a time. DIR holds points/, recall.json, recall.md and recall.svg.
"""

from __future__ import annotations

import re

from absl import flags

from launch import cli

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the study", required=True)


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    from launch.benchmarks import machine
    from lm.run.progress import GridBar
    from lm.studies import recall

    study = recall.create(_CONFIG.value.to_dict())
    workdir = cli.path("workdir", _WORKDIR.value)
    with GridBar(len(recall.points(study))) as bar:
        rows = recall.run(study, workdir, lambda point, *rest: bar.told(point.name, *rest))
    head = machine.describe("launch.recall")
    # Where it ran is of no use to who repeats it.
    head["command"] = re.sub(r"(--workdir[= ])\S+", r"\1DIR", head["command"])
    recall.write(rows, head, workdir)
    print((workdir / "recall.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    cli.run(main)
