"""A run that moves to other devices twice, and one that stays.

    python -m tests.lm.elastic FOLDER KEY_OF_MESHES

test_processes.py starts it with 8 CPU devices, in a folder with a corpus. FOLDER/whole.batches and
FOLDER/moved.batches list the digests of the batches that the loaders yielded, one line per step.
"""

import dataclasses
import hashlib
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
from lm.data.batch import Batch
from lm.data.loader import Loader
from lm.parallel import mesh as mesh_lib
from tests.lm import lab, tiny

STEPS = 12
CHANGES = lab.CHANGES | {
    "model.num_layers": 1,
    "data.batch_size": 8,
    "optimizer.eps": 1e-3,  # Adam must not make a step of its full size from rounding error
    "checkpoint.every": "4 steps",
}
Mesh = tuple[int, dict[str, Any]]  # number of devices, changes to the configuration
MESHES: dict[str, tuple[Mesh, Mesh, Mesh]] = {
    "sizes": (
        (8, {"mesh.data": 4, "mesh.fsdp": 2}),
        (4, {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 1}),
        (2, {"mesh.data": 2, "run.accumulation": 2, "model.remat": "full"}),
    ),
    "sequence": (
        (2, {"mesh.data": 1, "mesh.sequence": 2}),
        (4, {"mesh.data": 1, "mesh.sequence": 4}),
        (1, {"mesh.data": 1}),
    ),
}


def config(folder: Path, mesh: Mesh) -> Config:
    return tiny.config(CHANGES | {"data.sources": lab.sources(folder / "corpus")} | mesh[1])


def compiled(folder: Path, mesh: Mesh) -> Build:
    """The build of a configuration, compiled with few optimisations."""
    built = build_lib.build(config(folder, mesh), jax.devices()[: mesh[0]])
    once = {name: lab.compiled_once(getattr(built, name)) for name in ("init", "step", "score")}
    return dataclasses.replace(built, **once)


def run(built: Build, folder: Path, name: str, *, until: int) -> None:
    """Trains until step `until`, where it stops as if by a signal."""
    read = Loader.__next__

    def stop(call: int, args: Any) -> None:
        if until < STEPS and int(args[0].step) == until - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def small(*_: Any, like: Build | None = None) -> Build:
        return dataclasses.replace(built, step=lab.hooked(built.step, stop))

    def recorded(loader: Loader) -> Batch:
        batch = read(loader)
        with (folder / f"{name}.batches").open("a") as out:
            print(*(hashlib.sha256(field.tobytes()).hexdigest() for field in batch), file=out)
        return batch

    options = train.Options(workdir=folder / name, data_dir=folder / "data")
    with (
        mock.patch.object(mesh_lib, "foreseen", return_value=(built.mesh.size, ("cpu",))),
        mock.patch.object(jax, "devices", return_value=list(built.mesh.devices.flat)),
        mock.patch.object(build_lib, "build", small),
        mock.patch.object(Loader, "__next__", recorded),
    ):
        done = train.run(built.config, options)
    assert (done.step, done.finished) == (until, until == STEPS)


def main() -> None:
    folder, meshes = Path(sys.argv[1]), MESHES[sys.argv[2]]
    with mock.patch.object(report, "write", lambda workdirs, out: out):
        builds = [compiled(folder, mesh) for mesh in meshes]
        run(builds[0], folder, "whole", until=STEPS)
        for built, until in zip(builds, (4, 8, STEPS), strict=True):
            run(built, folder, "moved", until=until)


if __name__ == "__main__":
    main()
