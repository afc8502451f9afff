"""Checkpoints of a run, read on any mesh and by any number of processes.

`workdir/checkpoints/<step>/` holds four items: state (TrainState, in Orbax's standard format), and
three plain ones (lm/run/items.py): loader (its place in the stream and the identity of the stream),
config, and meta (tokens seen, where a decay branched, digests of every array and of the plain
items). lm/run/saver.py writes them.

A checkpoint is damaged if a digest does not match or a file cannot be read. A run that meets one
says so, moves it aside and continues from the one before. If the user named the damaged one, the
error says which other checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lm import build as build_lib
from lm import layers as layer_lib
from lm import params as params_lib
from lm.build import Build
from lm.config import Config, MeshConfig, UserError, convert, to_mapping, validate_mesh
from lm.data import tokenizers
from lm.model import Model
from lm.parallel import processes
from lm.run import formats, items
from lm.run.digest import digest
from lm.run.failures import RaisedAs, quiet
from lm.run.items import Meta
from lm.state import TrainState, as_int

FOLDER = "checkpoints"
TOKENIZER = "tokenizer.json"


class DamagedError(UserError):
    """A checkpoint is not whole; the message says what shows it."""


class Restored(NamedTuple):
    state: TrainState
    loader: dict[str, Any]
    config: dict[str, Any]
    meta: Meta


class Loaded(NamedTuple):
    """What a notebook starts from. Use `params` as `model.apply({"params": params}, ...)`."""

    model: Model
    params: Any
    tokenizer: tokenizers.Tokenizer
    config: Config
    step: int
    build: Build


def locate(path: Path) -> Path:
    """A workdir (its newest checkpoint) or a checkpoint folder -> the checkpoint folder.

    Raises:
      UserError: there is no checkpoint.
    """
    path = path.expanduser().absolute()
    if (path / "meta").is_dir():
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    if found := steps(folder.parent):
        return folder / str(max(found))
    if path.parent.name == FOLDER and (found := steps(path.parent.parent)):
        there = ", ".join(map(str, found))
        raise UserError(f"{path} is not a checkpoint; {path.parent} has those of steps {there}")
    raise UserError(
        f"{path} is neither a run with checkpoints nor a checkpoint; give WORKDIR or "
        f"WORKDIR/{FOLDER}/STEP"
    )


def steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints in a workdir, including damaged ones."""
    return sorted(int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit())


def newest(workdir: Path) -> tuple[Config, Meta]:
    """The configuration and meta of the newest checkpoint in which both can be read.

    Raises:
      UserError: there is no such checkpoint.
    """
    message = f"{workdir} has no checkpoint"
    for step in reversed(steps(workdir)):
        path = workdir.absolute() / FOLDER / str(step)
        try:
            return _read_config(path), _read_meta(path)
        except DamagedError as error:
            message = str(error)
    raise UserError(f"{message}; restore a copy, or choose another workdir")


def read_meta(path: Path) -> Meta:
    """The meta item of a checkpoint folder.

    Raises:
      UserError: it is damaged; the message names another checkpoint of the run that is whole.
    """
    with _suggesting_a_whole_one(path):
        return _read_meta(path)


def read_config(path: Path) -> Config:
    """The configuration of the run that wrote a checkpoint folder. Raises as `read_meta`."""
    with _suggesting_a_whole_one(path):
        return _read_config(path)


def read_loader(path: Path) -> dict[str, Any]:
    """The place in the stream and the identity of the stream. Raises as `read_meta`."""
    with _suggesting_a_whole_one(path), _raising_damaged(path):
        return items.read(path, "loader", items.read_meta(path))


def restore(path: Path, abstract: TrainState) -> Restored:
    """Restores a checkpoint folder into the shapes and shardings of `abstract`.

    Raises:
      UserError: it is damaged, as in `read_meta`, or its model has other parameters.
    """
    with _suggesting_a_whole_one(path), quiet():
        _check_shapes(path, abstract)
        restored = read(path, abstract)
        check(path, restored)
        return restored


def restore_params(path: Path, abstract: TrainState) -> Any:
    """The weights of a checkpoint folder alone. Raises as `restore`."""
    with _suggesting_a_whole_one(path):
        _check_shapes(path, abstract)
        return _read_params(path, abstract.params)


def read_params(path: Path, params: Any) -> Any:
    """The weights of a checkpoint folder that are in `params`, which may be a part of the whole
    tree. Raises as `read_meta`.
    """
    with _suggesting_a_whole_one(path):
        return _read_params(path, params)


def load(
    workdir: str | os.PathLike[str],
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    mesh: Mapping[str, Any] | None = None,
) -> Loaded:
    """`lm.load(workdir)`: loads the newest checkpoint of a run, or a given checkpoint, on one
    device of this machine. With `mesh` it is on all devices: {"sequence": 4}; the keys are those of
    `MeshConfig` that differ from one device. `layers` maps labels to options that differ from the
    run's.

    Raises:
      UserError: the checkpoint is damaged, a label or option is unknown, the options need other
      parameters, or the mesh does not divide a size.
    """
    path, split = locate(Path(workdir)), _mesh(mesh) if mesh else None
    with _suggesting_a_whole_one(path):
        config, meta = _read_config(path), _read_meta(path)
        if layers:
            model = layer_lib.change_layers(config.model, layers)
            config = dataclasses.replace(config, model=model)
        built = build_lib.local(config, meta.decay_start, split)
        if layers:
            _check_shapes(path, built.abstract_state, "change only options without parameters")
        params = _read_params(path, built.abstract_state.params)
    tokenizer = tokenizers.load(path.parent.parent / TOKENIZER)
    return Loaded(built.model, params, tokenizer, config, meta.step, built)


def _mesh(changes: Mapping[str, Any]) -> MeshConfig:
    mesh = convert(MeshConfig, to_mapping(build_lib.ONE_DEVICE) | dict(changes), "mesh")
    validate_mesh(mesh)
    return mesh


def _read_meta(path: Path) -> Meta:
    with _raising_damaged(path):
        return items.read_meta(path)


def _read_config(path: Path) -> Config:
    with _raising_damaged(path):
        values = items.read(path, "config", items.read_meta(path))
    return formats.read(values, f"{path}/config")


def _read_params(path: Path, params: Any) -> Any:
    item = {"params": params}
    placed = ocp.checkpoint_utils.construct_restore_args(item)
    with quiet(), _raising_damaged(path):
        found = _arrays(
            path, ocp.args.PyTreeRestore(item, restore_args=placed, partial_restore=True)
        )
        _check_digest(found, items.read_meta(path))
        return found["params"]


def _arrays(path: Path, args: ocp.args.PyTreeRestore) -> Any:
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
        return reader.restore(path / "state", args=args)


@contextlib.contextmanager
def _suggesting_a_whole_one(path: Path) -> Iterator[None]:
    """Adds to the error of a damaged checkpoint the newest checkpoint of the same run that is
    whole. Every array of it is read to know that.
    """
    try:
        yield
    except DamagedError as error:
        others = [p for p in path.parent.glob("*") if p.name.isdigit() and p != path]
        newest_first = sorted(others, key=lambda p: int(p.name), reverse=True)
        found = next(filter(_is_whole, newest_first), None)
        advice = f"{found} is whole: name that" if found else "no other is whole: restore a copy"
        raise DamagedError(f"{error}; {advice}") from None


def _is_whole(path: Path) -> bool:
    """Whether every item of a checkpoint can be read, into host memory, whatever its model is."""
    host = ocp.RestoreArgs(restore_type=np.ndarray)
    try:
        with quiet(), _raising_damaged(path):
            meta = items.read_meta(path)
            for name in items.OTHERS:
                items.read(path, name, meta)
            place: Any = path / "state"
            tree = ocp.PyTreeCheckpointHandler().metadata(place).tree
            placed = jax.tree.map(lambda _: host, tree)
            _check_digest(_arrays(path, ocp.args.PyTreeRestore(restore_args=placed)), meta)
    except DamagedError:
        return False
    return True


def read(path: Path, abstract: TrainState) -> Restored:
    """The part of a checkpoint that this process's devices hold. No process waits for another.

    Raises:
      DamagedError: it cannot be read. `check` finds out whether it is what was saved.
    """
    with _raising_damaged(path):
        meta = items.read_meta(path)
        loader, config = (items.read(path, name, meta) for name in items.OTHERS)
        if not any(name.startswith("opt_state/") for name in meta.digest):
            raise UserError(
                f"checkpoint {path} holds weights and no optimizer state; start a run in a new "
                "workdir with init_from set to it"
            )
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
            state = reader.restore(path / "state", formats.stored(abstract, meta.digest))
        if not isinstance(state, TrainState):
            rows = _read_config(path).batches.before(meta.step)
            state = formats.counted(state, abstract, tokens=meta.tokens, rows=rows)
        return Restored(state, loader, config, meta)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options that keep Orbax from waiting for the other processes after reading: if one of them
    failed it would wait forever.
    """
    me = processes.index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def check(path: Path, restored: Restored) -> None:
    """Checks digests and counts of whole arrays. All processes call this together.

    Raises:
      DamagedError: the checkpoint is not what was saved.
    """
    state, loader, _, meta = restored
    with _raising_damaged(path):
        _check_digest(formats.stored(state, meta.digest), meta)
        if as_int(state.tokens) != meta.tokens:
            raise ValueError(f"state has {as_int(state.tokens)} tokens, meta {meta.tokens}")
        steps = (int(state.step), meta.step, loader["next_step"])
        if len(set(steps)) > 1:
            raise ValueError(f"state, meta and loader are at steps {steps}")


def _check_digest(state: Any, meta: Meta) -> None:
    for name, value in digest(state).items():
        if meta.digest[name] != value:
            raise ValueError(f"digest of {name} is {value}, recorded {meta.digest[name]}")


def _raising_damaged(path: Path) -> RaisedAs:
    return RaisedAs(lambda reason: DamagedError(f"checkpoint {path} is damaged: {reason}"))


def _check_shapes(
    path: Path, abstract: TrainState, advice: str = "set config.model to the checkpoint's"
) -> None:
    """Tells a different model apart from a damaged file, before any array is read."""
    stored, wanted = _read_meta(path).shapes, shapes(abstract.params)
    for name in sorted(stored.keys() | wanted.keys()):
        a, b = stored.get(name), wanted.get(name)
        if a != b:
            raise UserError(
                f"checkpoint {path} has {name} {a or 'not at all'}, the model of this config has "
                f"{b or 'no such parameter'}; {advice}"
            )


def shapes(tree: Any) -> dict[str, list[int]]:
    """The shape of every leaf, by name."""
    names = jax.tree.leaves(params_lib.names(tree))
    return {n: list(leaf.shape) for n, leaf in zip(names, jax.tree.leaves(tree), strict=True)}
