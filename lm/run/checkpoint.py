"""Checkpoints of a run, and the way back from them, on any mesh and by any number of processes.

`workdir/checkpoints/<step>/` holds four items: state (TrainState, Orbax standard), loader (its one
integer and what it reads), config, and meta (tokens seen, where a decay branched, a digest of every
array). Saves are asynchronous and atomic: an interrupted one leaves a temporary folder that is
ignored and removed. A digest that does not match, or files that cannot be read, make a checkpoint
damaged: it is named, moved aside, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lm import build as build_lib
from lm import layers as layer_lib
from lm import params as params_lib
from lm.build import Build
from lm.config import Config, UserError
from lm.data import tokenizers
from lm.model import Model
from lm.parallel import processes
from lm.run import formats
from lm.run.digest import digest
from lm.run.telling import Telling, quiet
from lm.state import TrainState, as_int

FOLDER = "checkpoints"
ITEMS = ("state", "loader", "config", "meta")
TOKENIZER = "tokenizer.json"

log = logging.getLogger(__name__)


class DamagedError(UserError):
    """A checkpoint that is not whole, and what shows it."""


class Meta(NamedTuple):
    """`tokens` seen at `step`; `decay_start` in tokens if a decay branched from a trunk;
    `digest` per array; `shapes` per parameter.
    """

    step: int
    tokens: int
    decay_start: float | None
    digest: dict[str, int]
    shapes: dict[str, list[int]]


class Restored(NamedTuple):
    state: TrainState
    loader: dict[str, Any]
    config: dict[str, Any]
    meta: Meta


class Loaded(NamedTuple):
    """What a notebook starts from. `params` is the tree `model.apply({"params": params}, ...)`
    takes.
    """

    model: Model
    params: Any
    tokenizer: tokenizers.Tokenizer
    config: Config
    step: int
    build: Build


class Checkpointer:
    """The checkpoints of one workdir, for the run that writes them. A context manager: leaving
    waits for saves.
    """

    def __init__(self, workdir: Path, config: Config) -> None:
        self._folder = (workdir / FOLDER).absolute()
        self._stack = contextlib.ExitStack()
        self._config = formats.write(config)
        keep_every = config.steps(config.checkpoint.keep_every)
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep_last,
            keep_period=keep_every or None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        try:
            with processes.first_alone():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(
                self._folder, options=self._options, item_names=ITEMS
            )
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder}: {error.strerror}; mend it or choose another workdir"
            ) from None

    def __enter__(self) -> Checkpointer:
        self._stack.enter_context(quiet())
        self._stack.callback(self._close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, loader: Mapping[str, Any], meta: Meta) -> None:
        """Starts saving; returns when the arrays are copied to the host.

        Raises:
          UserError: this save or the one before could not be written.
        """
        if self.latest == meta.step:
            return
        meta = meta._replace(digest=digest(state), shapes=shapes(state.params))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            loader=ocp.args.JsonSave(dict(loader)),
            config=ocp.args.JsonSave(self._config),
            meta=ocp.args.JsonSave(meta._asdict()),
        )
        self.check()
        with Telling(self._unsaved):
            self._manager.save(meta.step, args=args)

    def check(self) -> None:
        """Raises as `save` does, at once, if a save under way has failed."""
        with Telling(self._unsaved):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk; raises as `save` does."""
        with Telling(self._unsaved):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def _close(self) -> None:
        """A save that was under way may fail now, when something else has ended the run."""
        with Telling(self._unsaved):
            self._manager.close()

    def _unsaved(self, reason: str) -> UserError:
        self._remove_unfinished()
        return UserError(
            f"cannot save a checkpoint in {self._folder}: {reason}; mend that (free some space?) "
            "and run the same command again"
        )

    def _remove_unfinished(self) -> None:
        if not processes.is_first():
            return
        for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, damaged newer ones moved aside; None if there is
        none at all.

        Raises:
          UserError: checkpoints exist and every one is damaged; they stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in processes.agree(sorted(self._manager.all_steps(), reverse=True)):
            restored, told = self._try(step, abstract)
            if restored is None:
                damaged[step] = told
                continue
            for other, told in damaged.items():
                aside = self._move_aside(other)
                if processes.is_first():
                    log.warning("%s; moved to %s, going on from step %d", told, aside, step)
            return restored
        if damaged:
            raise UserError(
                f"every checkpoint is damaged, the newest: {next(iter(damaged.values()))}; "
                "restore a copy or choose a new workdir"
            )
        return None

    def _try(self, step: int, abstract: TrainState) -> tuple[Restored | None, str]:
        """A checkpoint, or what is wrong with it. Each process reads what its devices need: one may
        find damage that another does not.
        """
        path, restored, told = self._folder / str(step), None, ""
        try:
            restored = _read(path, abstract)
        except DamagedError as error:
            told = str(error)
        told = next(filter(None, processes.gather(told)), "")
        if restored is None or told:
            return None, told
        try:
            _check(path, restored)
        except DamagedError as error:
            return None, str(error)
        return restored, ""

    def _move_aside(self, step: int) -> Path:
        aside = self._folder.parent / "damaged" / str(step)
        if processes.is_first():
            if aside.exists():
                shutil.rmtree(aside)
            aside.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
        processes.wait()
        self._manager.reload()
        return aside


def locate(path: Path) -> Path:
    """A workdir (its newest checkpoint) or a checkpoint folder -> the checkpoint folder.

    Raises:
      UserError: nothing there.
    """
    path = path.expanduser().absolute()
    if (path / "meta").is_dir():
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    found = steps(folder.parent)
    if not found:
        raise UserError(
            f"{path} is neither a run with checkpoints nor a checkpoint; give WORKDIR or "
            f"WORKDIR/{FOLDER}/STEP"
        )
    return folder / str(max(found))


def steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints in a workdir, damaged ones too."""
    return sorted(int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit())


def read_meta(path: Path) -> Meta:
    """Meta of a checkpoint folder."""
    with _telling_damage(path):
        return _meta(_json(path, "meta"))


def read_config(path: Path) -> Config:
    """The configuration of the run that wrote a checkpoint folder."""
    with _telling_damage(path):
        return formats.read(_json(path, "config"), f"{path}/config")


def restore(path: Path, abstract: TrainState) -> Restored:
    """A checkpoint folder named by the user, into the shapes and shardings of `abstract`.

    Raises:
      UserError: damaged, or of a model with other parameters.
    """
    _check_shapes(path, abstract)
    with quiet():
        restored = _read(path, abstract)
        _check(path, restored)
        return restored


def restore_params(path: Path, abstract: TrainState) -> Any:
    """Only the weights of a checkpoint folder; what `restore` raises."""
    _check_shapes(path, abstract)
    return read_params(path, abstract.params)


def read_params(path: Path, params: Any) -> Any:
    """These weights of a checkpoint folder: `params` may be a part of the tree.

    Raises:
      UserError: damaged.
    """
    item = {"params": params}
    placed = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=placed, partial_restore=True)
    with quiet(), _telling_damage(path):
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
            found = reader.restore(path / "state", args=args)
        _check_digest(found, _meta(_json(path, "meta")))
        return found["params"]


def load(
    workdir: str | os.PathLike[str], layers: Mapping[str, Mapping[str, Any]] | None = None
) -> Loaded:
    """`lm.load(workdir)`: the newest checkpoint of a run (or the checkpoint given) on this
    machine's devices. `layers` maps labels to options that differ from the run's.

    Raises:
      UserError: damaged; an unknown label or option; options that ask for other parameters.
    """
    path = locate(Path(workdir))
    config = read_config(path)
    meta = read_meta(path)
    if layers:
        model = layer_lib.change_layers(config.model, layers)
        config = dataclasses.replace(config, model=model)
    built = build_lib.local(config, meta.decay_start)
    if layers:
        _check_shapes(path, built.abstract_state, "change only options that have no parameters")
    params = restore_params(path, built.abstract_state)
    tokenizer = tokenizers.load(path.parent.parent / TOKENIZER)
    return Loaded(built.model, params, tokenizer, config, meta.step, built)


def _read(path: Path, abstract: TrainState) -> Restored:
    """What this process's devices hold of a checkpoint; no process waits for another."""
    with _telling_damage(path):
        meta, loader = _meta(_json(path, "meta")), _json(path, "loader")
        if not any(name.startswith("opt_state/") for name in meta.digest):
            raise UserError(
                f"checkpoint {path} holds weights and no optimizer state; start a run in a new "
                "workdir with init_from set to it"
            )
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
            state = reader.restore(path / "state", formats.stored(abstract, meta.digest))
        if not isinstance(state, TrainState):
            rows = meta.step * read_config(path).data.batch_size
            state = formats.counted(state, abstract, tokens=meta.tokens, rows=rows)
        return Restored(state, loader, _json(path, "config"), meta)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax waits for the other processes after reading, and for ever if one of them failed."""
    me = processes.index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _check(path: Path, restored: Restored) -> None:
    """Of whole arrays: all processes come here together."""
    state, loader, _, meta = restored
    with _telling_damage(path):
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


def _telling_damage(path: Path) -> Telling:
    return Telling(lambda reason: DamagedError(f"checkpoint {path} is damaged: {reason}"))


def _json(path: Path, item: str) -> dict[str, Any]:
    return json.loads((path / item / "metadata").read_text())


def _meta(value: dict[str, Any]) -> Meta:
    return Meta(**{field: value[field] for field in Meta._fields})


def _check_shapes(
    path: Path, abstract: TrainState, advice: str = "set config.model to the checkpoint's"
) -> None:
    """Tells a different model from a damaged file, before any array is read."""
    stored, wanted = read_meta(path).shapes, shapes(abstract.params)
    for name in sorted(stored.keys() | wanted.keys()):
        a, b = stored.get(name), wanted.get(name)
        if a != b:
            raise UserError(
                f"checkpoint {path} has {name} {a or 'not at all'}, this config's model has "
                f"{b or 'it not'}; {advice}"
            )


def shapes(tree: Any) -> dict[str, list[int]]:
    """Of every leaf, by name."""
    names = jax.tree.leaves(params_lib.names(tree))
    return {n: list(leaf.shape) for n, leaf in zip(names, jax.tree.leaves(tree), strict=True)}
