"""Writes the checkpoints of a run (lm/run/checkpoint.py), deletes old ones, and finds the one to
continue from.

Saves are asynchronous and atomic. An interrupted save leaves a temporary folder, which is ignored
and later removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp

from lm import files
from lm.config import Config, UserError
from lm.parallel import processes
from lm.run import checkpoint, formats, items
from lm.run.checkpoint import FOLDER, DamagedError, Restored
from lm.run.digest import digest
from lm.run.failures import RaisedAs, quiet
from lm.run.items import Meta
from lm.state import TrainState

ITEMS = ("state", "loader", "config", "meta")

log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one workdir, for the run that writes them. A context manager, which waits
    for saves on exit. It keeps the newest config.checkpoint.keep_last and the steps that `keeps`
    selects.
    """

    def __init__(self, workdir: Path, config: Config, keeps: Callable[[int], bool]) -> None:
        self.folder = (workdir / FOLDER).absolute()
        self._stack = contextlib.ExitStack()
        self._config = formats.write(config)
        self._kept = _Kept(config.checkpoint.keep_last, keeps)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        try:
            with processes.first_alone():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(
                self.folder, options=self._options, item_names=ITEMS
            )
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror}; {files.advice(error)}"
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
        """Starts a save; returns once the arrays are copied to the host.

        Raises:
          UserError: this save or the previous one could not be written.
        """
        if self.latest == meta.step:
            return
        meta = meta._replace(digest=digest(state), shapes=checkpoint.shapes(state.params))
        plain = items.plain(meta, loader, self._config)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            **{name: ocp.args.JsonSave(value) for name, value in plain.items()},
        )
        self.check()
        with RaisedAs(self._unsaved):
            self._manager.save(meta.step, args=args)

    def check(self) -> None:
        """Raises as `save` does if a save under way has failed; does not wait."""
        with RaisedAs(self._unsaved):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until everything is on disk; raises as `save` does."""
        with RaisedAs(self._unsaved):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def _close(self) -> None:
        """A save under way may fail here, after something else has ended the run."""
        with RaisedAs(self._unsaved):
            self._manager.close()

    def _unsaved(self, reason: str) -> UserError:
        self._remove_unfinished()
        is_full = os.strerror(errno.ENOSPC) in reason
        return UserError(
            f"cannot save a checkpoint in {self.folder}: {reason}; "
            f"{'free some space' if is_full else 'mend that'} and run the same command again"
        )

    def _remove_unfinished(self) -> None:
        if not processes.is_first():
            return
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none. Newer ones that are damaged
        are moved aside.

        Raises:
          UserError: every checkpoint is damaged; they stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in processes.agree(sorted(self._manager.all_steps(), reverse=True)):
            restored, message = self._try(step, abstract)
            if restored is None:
                damaged[step] = message
                continue
            for other, message in damaged.items():
                aside = self._move_aside(other)
                if processes.is_first():
                    log.warning("%s; moved to %s, going on from step %d", message, aside, step)
            return restored
        if damaged:
            raise UserError(
                f"every checkpoint is damaged, the newest: {next(iter(damaged.values()))}; "
                "restore a copy or choose a new workdir"
            )
        return None

    def _try(self, step: int, abstract: TrainState) -> tuple[Restored | None, str]:
        """A checkpoint, or what is wrong with it. Each process reads what its devices need, so one
        may find damage that another does not see.
        """
        path, restored, message = self.folder / str(step), None, ""
        try:
            restored = checkpoint.read(path, abstract)
        except DamagedError as error:
            message = str(error)
        message = next(filter(None, processes.gather(message)), "")
        if restored is None or message:
            return None, message
        try:
            checkpoint.check(path, restored)
        except DamagedError as error:
            return None, str(error)
        return restored, ""

    def remove_old(self) -> None:
        """Deletes checkpoints that a killed run should have deleted but had no time to."""
        found = checkpoint.steps(self.folder.parent)
        old = [
            step for step, is_kept in zip(found, self._kept.of(found), strict=True) if not is_kept
        ]
        processes.wait()
        if processes.is_first():
            for step in old:
                shutil.rmtree(self.folder / str(step))
        processes.wait()
        if old:
            self._manager.reload()

    def _move_aside(self, step: int) -> Path:
        aside = self.folder.parent / "damaged" / str(step)
        if processes.is_first():
            if aside.exists():
                shutil.rmtree(aside)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        processes.wait()
        self._manager.reload()
        return aside


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The checkpoints that stay, as Orbax asks: the last ones, and steps that `keeps` selects."""

    last: int
    keeps: Callable[[int], bool]

    def of(self, steps: Sequence[int]) -> list[bool]:
        newest = steps[-self.last :]
        return [step in newest or self.keeps(step) for step in steps]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return self.of([checkpoint.step for checkpoint in checkpoints])
