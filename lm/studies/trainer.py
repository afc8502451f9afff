"""Many short runs in one process: runs of the same shapes share their compiled functions."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import jax

from lm import build as build_lib
from lm import train
from lm.build import Build
from lm.config import Config, Duration


@dataclasses.dataclass
class Trainer:
    """`builds` are those whose compiled functions can be used again. `is_stopped`: a signal asked
    to stop; whoever trains more runs must check it.
    """

    data_dir: Path
    builds: list[Build] = dataclasses.field(default_factory=list)
    is_stopped: bool = False

    def train(self, config: Config, workdir: Path, *, with_report: bool = False) -> bool:
        """`lm.train.run`; returns whether the run ended, and was not stopped before.

        Raises:
          UserError: as in `lm.train.run`.
        """
        like = self.like(config)
        options = train.Options(
            workdir=workdir, data_dir=self.data_dir, like=like, with_report=with_report
        )
        done = train.run(config, options)
        gc.collect()  # a run leaves cycles that hold its data, each a mapping of the whole file
        self.is_stopped |= done.stopped
        return done.finished

    def like(self, config: Config) -> Build:
        """A build whose compiled functions are those that this configuration would have."""
        devices = jax.devices()
        for built in self.builds:
            if build_lib.compiles_alike(config, built.config, devices, built.mesh):
                return built
        self.builds.append(build_lib.build(config, devices))
        return self.builds[-1]


def brief(config: Config, *, is_evaluated: bool) -> Config:
    """A run of which only the last checkpoint is used and, with `is_evaluated`, the loss of its
    last evaluation; without tasks and samples.
    """
    whole, none = Duration(100, "percent"), Duration(0, "steps")
    evaluate = dataclasses.replace(config.evaluate, every=whole, tasks={})
    if not is_evaluated:  # the end of a run is always evaluated
        evaluate = dataclasses.replace(evaluate, max_tokens=config.data.context_length)
    kept = dataclasses.replace(config.checkpoint, keep_last=1, keep_every=none)
    log = dataclasses.replace(config.log, samples=())
    return dataclasses.replace(config, evaluate=evaluate, checkpoint=kept, log=log)
