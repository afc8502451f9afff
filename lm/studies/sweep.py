"""A sweep trains every cell of one or more grids into one table. Each cell is trained once, even
if processes are killed or several work on the sweep.

    cells (lm/studies/cells.py) -> for every trunk, its shortest cell first:
        trunk up to the decay of that cell -> the decay, a run that branches there -> a row

Several processes may work in one folder: each takes a trunk that no other has. What a cell leaves
besides its row (checkpoints of its decay, or of a finished trunk) is removed at once.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import metrics, train
from lm import params as params_lib
from lm.config import RunValues, UserError, convert
from lm.run import checkpoint, record
from lm.studies import cells as cells_lib
from lm.studies import grid, rows
from lm.studies.cells import Cell, Planned
from lm.studies.grid import Grid
from lm.studies.rows import Outcome, Row
from lm.studies.trainer import Trainer, brief

TRUNK, OWN = "trunk", "run"  # folders: that of a trunk, and that of a cell's run
HALVED = "schedule.peak_learning_rate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Grids of runs.

    Attributes:
      run: a whole configuration
      grids: each maps keys of it (and "width", which also widens heads and feed-forward) to values;
        a grid is every combination of its values, and a cell that is in two grids counts once
      min_steps: cells of fewer steps are left out
      halving: after each length, of the cells that differ only in the peak learning rate, one in
        `halving` continues to the next length: the best by mean loss over seeds; 0: all continue
    """

    run: RunValues
    grids: tuple[Mapping[str, Any], ...]
    min_steps: int
    halving: int


def create(mapping: Mapping[str, Any]) -> Sweep:
    """Nested plain values -> a sweep.

    Raises:
      UserError: unknown or missing keys, no grid, or a negative number.
    """
    sweep: Sweep = convert(Sweep, mapping, "config")
    if not sweep.grids or not all(sweep.grids):
        raise UserError("config.grids is empty; give --grid=KEY=VALUE,VALUE at least once")
    if sweep.min_steps < 0:
        raise UserError(f"config.min_steps={sweep.min_steps} must be >= 0")
    if sweep.halving < 0 or sweep.halving == 1:
        raise UserError(f"config.halving={sweep.halving} must be 0 (all continue) or at least 2")
    return sweep


def completed(
    values: Mapping[str, Any], axes: Mapping[str, Any], given: Mapping[str, int | None]
) -> dict[str, Any]:
    """The values of a sweep from those of a run or of a sweep. `axes` are added to every grid;
    `given` are numbers of the sweep, where not None.
    """
    bare = {"run": values, "grids": (), "min_steps": 0, "halving": 0}
    found = dict(values) if "grids" in values else bare
    if axes:
        found["grids"] = tuple({**grid, **axes} for grid in found["grids"] or ({},))
    return found | {name: value for name, value in given.items() if value is not None}


def plan(sweep: Sweep) -> dict[Cell, Planned]:
    """The cells, after a check that each could be trained.

    Raises:
      UserError: as in lm.studies.cells.plan.
    """
    for axes in sweep.grids:
        for key, values in axes.items():
            if not isinstance(values, list | tuple):
                raise UserError(
                    f"config.grids: {key}={values!r} is not a list; write ({values!r},)"
                )
    return cells_lib.plan(sweep.run, sweep.grids, sweep.min_steps)


def run(
    sweep: Sweep,
    workdir: Path,
    data_dir: Path,
    *,
    table: Sequence[Row] = (),
    report: Callable[[list[Row]], None] = lambda found: None,
) -> list[Row] | None:
    """The rows of every cell, from the folder, from `table` or by training; None if a signal
    stopped it. `report` is called after every cell with the rows so far, and with the rows of
    `table` that belong to no cell of the sweep.

    Raises:
      UserError: the folder holds cells of another configuration, or training reports a mistake.
    """
    planned = plan(sweep)
    asked = {cell: one.asked for cell, one in planned.items()}
    cells = Grid(folder=workdir / "cells", outcome=Outcome, asked=asked, table=rows.entries(table))
    merged = lambda found: rows.merged(_rows(planned, found), table)
    trainer = Trainer(data_dir)

    def left(found: Mapping[Cell, Outcome]) -> list[Cell]:
        report(merged(found))
        return [] if trainer.is_stopped else _left(sweep, planned, found)

    found = grid.run(cells, _Worker(planned, trainer), left)
    if found is None or trainer.is_stopped:
        return None
    for trunk in cells.folder.glob(f"{TRUNK}-*"):
        shutil.rmtree(trunk, ignore_errors=True)
    return _rows(planned, found)


def _rows(planned: Mapping[Cell, Planned], found: Mapping[Cell, Outcome]) -> list[Row]:
    return [rows.row(cell, planned[cell], found[cell]) for cell in planned if cell in found]


def _left(
    sweep: Sweep, planned: Mapping[Cell, Planned], found: Mapping[Cell, Outcome]
) -> list[Cell]:
    """The next cell of every trunk: the shortest one not found yet, if halving lets it continue."""
    nexts: dict[str, Cell] = {}
    for cell, one in planned.items():
        if cell in found:
            continue
        other = nexts.get(cell.trunk)
        if other is None or (one.start or 0, cell.steps) < (planned[other].start or 0, other.steps):
            nexts[cell.trunk] = cell
    if not sweep.halving:
        return list(nexts.values())
    brackets: dict[str, list[Cell]] = {}
    for cell, one in planned.items():
        brackets.setdefault(_bracket(one), []).append(cell)
    return [
        cell
        for cell in nexts.values()
        if _survives(sweep.halving, planned, found, cell, brackets[_bracket(planned[cell])])
    ]


def _survives(
    halving: int,
    planned: Mapping[Cell, Planned],
    found: Mapping[Cell, Outcome],
    cell: Cell,
    bracket: Sequence[Cell],
) -> bool:
    """Whether a cell is among the best of the previous length; all of those must be found.
    `bracket` are the cells that it competes with, including itself.
    """
    lengths = sorted({x.steps for x in bracket})
    survivors = {planned[x].config.schedule.peak_learning_rate for x in bracket}
    for length in lengths[: lengths.index(cell.steps)]:
        losses: dict[float, list[float]] = {}
        for x in bracket:
            rate = planned[x].config.schedule.peak_learning_rate
            if x.steps != length or rate not in survivors:
                continue
            if x not in found:
                return False  # not known yet
            loss = found[x].loss
            losses.setdefault(rate, []).append(math.inf if loss is None else loss)
        ranked = sorted(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))
        survivors = set(ranked[: max(1, len(ranked) // halving)])
    return planned[cell].config.schedule.peak_learning_rate in survivors


def _bracket(planned: Planned) -> str:
    """Equal for cells that differ only in length, decay, seed and the peak learning rate."""
    free = ("seed", HALVED, "run.length", "schedule.decay")
    return grid.digest({key: x for key, x in planned.asked.items() if key not in free})


@dataclasses.dataclass(frozen=True)
class _Worker:
    """Trains the cells of a grid."""

    planned: Mapping[Cell, Planned]
    trainer: Trainer

    def __call__(self, cell: Cell, place: Path) -> Outcome | None:
        """Trains a cell; None if a signal stopped it. The folder of its trunk is beside its own."""
        began = time.perf_counter()
        own, trunk = place / OWN, place.parent / f"{TRUNK}-{cell.trunk}"
        try:
            if not self._train(self.planned[cell], own, trunk):
                return None
        except train.DivergedError:
            # It diverged in the trunk, unless the decay had begun.
            return self._outcome(cell, own if metrics.read(own) else trunk, "diverged", began)
        found = self._outcome(cell, own, "done", began)
        shutil.rmtree(own / checkpoint.FOLDER)
        return found

    def _train(self, one: Planned, own: Path, trunk: Path) -> bool:
        config = one.config
        if one.start is not None:
            steps = checkpoint.steps(trunk)
            if steps and steps[-1] > one.start:
                shutil.rmtree(trunk)  # it had continued for a longer cell, so it starts again
            if not self.trainer.train(brief(one.trunk, is_evaluated=False), trunk):
                return False
            start = trunk / checkpoint.FOLDER / str(one.start)
            config = dataclasses.replace(config, decay_from=str(start))
        return self.trainer.train(brief(config, is_evaluated=True), own)

    def _outcome(self, cell: Cell, folder: Path, status: Any, began: float) -> Outcome:
        """The outcome of a run, from its last record."""
        last, infos = metrics.read(folder)[-1], self.trainer.like(self.planned[cell].config).infos
        losses = metrics.validation_losses(last)
        is_finite = status == "done" and all(map(math.isfinite, losses.values()))
        return Outcome(
            status="done" if is_finite else "diverged",
            losses=losses if is_finite else {},
            skipped=int(last["optim/skipped_total"]),
            seconds=time.perf_counter() - began,
            parameters=params_lib.count(infos)["total"],
            body_parameters=params_lib.count(infos, without="vocab")["total"],
            commit=record.commit().partition("-")[0],
            cpu=record.cpu(),
        )
