"""Checkpoints of a run, and the way back from them.

`workdir/checkpoints/<step>/` holds four items: state (TrainState, Orbax standard), loader (its one
integer and what it reads), config, and meta (tokens seen, where a decay branched, a digest of every
array). Saves are asynchronous and atomic: an interrupted one leaves a temporary folder that is
ignored and removed. A digest that does not match, or files that cannot be read, make a checkpoint
damaged: it is named, moved aside, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm import build as build_lib
from lm import params as params_lib
from lm.build import Build
from lm.config import Config, UserError, from_mapping, to_mapping
from lm.data import tokenizers
from lm.model import Model
from lm.state import TrainState

FOLDER = "checkpoints"
ITEMS = ("state", "loader", "config", "meta")
TOKENIZER = "tokenizer.json"

# What Orbax, tensorstore and json raise on files that are missing, cut short or garbled.
DAMAGE = (OSError, ValueError, KeyError, TypeError)

log = logging.getLogger(__name__)


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
        self._config = to_mapping(config)
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        keep_every = config.steps(config.checkpoint.keep_every)
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep_last,
            keep_period=keep_every or None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._folder, options=self._options, item_names=ITEMS
            )
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder}: {error.strerror}; mend it or choose another workdir"
            ) from None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._manager.close()

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
        meta = meta._replace(digest=digest(state), shapes=_shapes(state.params))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            loader=ocp.args.JsonSave(dict(loader)),
            config=ocp.args.JsonSave(self._config),
            meta=ocp.args.JsonSave(meta._asdict()),
        )
        with self._failures_in_one_line():
            self._manager.check_for_errors()
            self._manager.save(meta.step, args=args)

    def wait(self) -> None:
        """Returns when everything is on disk; raises as `save` does."""
        with self._failures_in_one_line():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _failures_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore tells of a full disk by a ValueError
            for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            known = os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in str(error) else None
            raise UserError(
                f"cannot save a checkpoint in {self._folder}: {known or _reason(error)}; "
                "mend that (free some space?) and run the same command again"
            ) from None

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, damaged newer ones moved aside; None if there is
        none at all.

        Raises:
          UserError: checkpoints exist and every one is damaged; they stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = _read(self._folder / str(step), abstract)
            except DAMAGE as error:
                damaged[step] = _reason(error)
            else:
                for other, reason in damaged.items():
                    aside = self._move_aside(other)
                    log.warning(
                        "checkpoint %s is damaged (%s); moved to %s, going on from %d",
                        *(self._folder / str(other), reason, aside, step),
                    )
                return restored
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f"every checkpoint of {self._folder} is damaged (the newest, {step}: {reason}); "
                "restore a copy or choose a new workdir"
            )
        return None

    def _move_aside(self, step: int) -> Path:
        aside = self._folder.parent / "damaged" / str(step)
        if aside.exists():
            shutil.rmtree(aside)
        aside.parent.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(aside)
        self._manager.reload()
        return aside


def digest(state: Any) -> dict[str, int]:
    """One 32-bit sum per array: bits weighted by odd numbers, so that flips and swaps both show."""
    sums = jax.device_get(_digest(state))
    names = jax.tree.leaves(params_lib.names(state))
    return {name: int(x) for name, x in zip(names, jax.tree.leaves(sums), strict=True)}


@jax.jit
def _digest(state: Any) -> Any:
    def leaf(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jax.tree.map(leaf, state)


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
    try:
        return _meta(_json(path, "meta"))
    except DAMAGE as error:
        raise _damaged(path, error) from None


def read_config(path: Path) -> Config:
    """The configuration of the run that wrote a checkpoint folder."""
    try:
        return from_mapping(_json(path, "config"))
    except DAMAGE as error:
        raise _damaged(path, error) from None


def restore(path: Path, abstract: TrainState) -> Restored:
    """A checkpoint folder named by the user, into the shapes and shardings of `abstract`.

    Raises:
      UserError: damaged, or of a model with other parameters.
    """
    _check_shapes(path, abstract)
    try:
        return _read(path, abstract)
    except DAMAGE as error:
        raise _damaged(path, error) from None


def restore_params(path: Path, abstract: TrainState) -> Any:
    """Only the weights of a checkpoint folder."""
    return restore(path, abstract).state.params


def load(workdir: str | os.PathLike[str]) -> Loaded:
    """`lm.load(workdir)`: the newest checkpoint of a run (or the checkpoint given) on this
    machine's devices.
    """
    path = locate(Path(workdir))
    config = read_config(path)
    meta = read_meta(path)
    mesh = {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, "replicate": []}
    local = from_mapping(to_mapping(config) | {"mesh": mesh})
    built = build_lib.build(local, jax.devices()[:1], decay_start=meta.decay_start)
    state = restore(path, built.abstract_state).state
    tokenizer = tokenizers.load(path.parent.parent / TOKENIZER)
    return Loaded(built.model, state.params, tokenizer, config, meta.step, built)


def _read(path: Path, abstract: TrainState) -> Restored:
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(path / "state", abstract)
    meta, loader = _meta(_json(path, "meta")), _json(path, "loader")
    found = digest(state)
    for name, value in found.items():
        if meta.digest.get(name) != value:
            raise ValueError(
                f"the digest of {name} is {value}, recorded was {meta.digest.get(name)}"
            )
    if not int(state.step) == meta.step == loader["next_step"]:
        raise ValueError(
            f"state, meta and loader are at steps {int(state.step)}, {meta.step} and "
            f"{loader['next_step']}"
        )
    return Restored(state, loader, _json(path, "config"), meta)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save with pages of tracebacks, and raises it too: that we tell."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"checkpoint {path} is damaged: {_reason(error)}")


def _json(path: Path, item: str) -> dict[str, Any]:
    return json.loads((path / item / "metadata").read_text())


def _meta(value: dict[str, Any]) -> Meta:
    return Meta(**{field: value[field] for field in Meta._fields})


def _check_shapes(path: Path, abstract: TrainState) -> None:
    """Tells a different model from a damaged file, before any array is read."""
    stored, wanted = read_meta(path).shapes, _shapes(abstract.params)
    for name in sorted(stored.keys() | wanted.keys()):
        a, b = stored.get(name), wanted.get(name)
        if a != b:
            raise UserError(
                f"checkpoint {path} has {name} {a or 'not at all'}, this config's model has "
                f"{b or 'it not'}; set config.model to the checkpoint's"
            )


def _shapes(tree: Any) -> dict[str, list[int]]:
    names = jax.tree.leaves(params_lib.names(tree))
    return {n: list(leaf.shape) for n, leaf in zip(names, jax.tree.leaves(tree), strict=True)}
