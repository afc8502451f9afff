"""A run that moves from 8 devices to 4 and to 2, and one that stays; test_processes.py runs it as a
process of 8 CPU devices, in a folder with a corpus:

    python -m tests.lm.elastic FOLDER
"""

import dataclasses
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from lm import build as build_lib
from lm import report, train
from lm.build import Build
from lm.config import Config
from tests.lm import lab, tiny

STEPS = 12
CHANGES = lab.CHANGES | {
    "model.num_layers": 1,
    "data.batch_size": 8,
    "optimizer.eps": 1e-3,  # a rounding error of a gradient near 0 must not become a sign
    "checkpoint.every": "4 steps",
}
MESHES: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {"mesh.data": 4, "mesh.fsdp": 2}),
    (4, {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 1}),
    (2, {"mesh.data": 2, "run.accumulation": 2, "model.remat": "full"}),
)


def config(folder: Path, mesh: int) -> Config:
    return tiny.config(CHANGES | {"data.sources": lab.sources(folder / "corpus")} | MESHES[mesh][1])


@functools.cache
def compiled(folder: Path, mesh: int) -> Build:
    """For one of `MESHES`, compiled once and fast."""
    built = build_lib.build(config(folder, mesh), jax.devices()[: MESHES[mesh][0]])
    once = {name: lab.compiled_once(getattr(built, name)) for name in ("init", "step", "score")}
    return dataclasses.replace(built, **once)


def run(folder: Path, name: str, mesh: int, *, until: int) -> None:
    """As if stopped by a signal in step `until`."""
    built = compiled(folder, mesh)

    def stop(call: int, args: Any) -> None:
        if until < STEPS and int(args[0].step) == until - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def small(*_: Any) -> Build:
        return dataclasses.replace(built, step=lab.hooked(built.step, stop))

    options = train.Options(workdir=folder / name, data_dir=folder / "data")
    with mock.patch.object(build_lib, "build", small):
        done = train.run(built.config, options)
    assert (done.step, done.finished) == (until, until == STEPS)


def main() -> None:
    folder = Path(sys.argv[1])
    with mock.patch.object(report, "write", lambda workdirs, out: out):
        run(folder, "whole", 0, until=STEPS)
        for mesh, until in enumerate((4, 8, STEPS)):
            run(folder, "moved", mesh, until=until)


if __name__ == "__main__":
    main()
