"""Selects the rows of a sweep that a law is fitted to.

A sweep trains every cell (width, tokens, batch, seed, ...) at several learning rates. The selection
is one of

    vertex  the best rate of every cell: the vertex of the parabola through the lowest loss and its
            two neighbors, over the logarithm of the rate
    near    every row within 0.25 % of the lowest loss of its (size, tokens), as in Step Law
    best    the lowest loss of every (size, tokens) and seed
    rows    every row

A cell whose lowest loss is at the smallest or largest rate only says where the optimum is not. Such
a cell is left out and named, and so is one where a neighbor of the lowest loss diverged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.fits.table import Table, spoken
from lm.laws import Selection
from lm.mapping import UserError

NEAR = 0.0025  # relative to the lowest loss (Li et al. 2025, arXiv 2503.04715)
RATE, BATCH, LOSS = "learning_rate", "batch_tokens", "loss"
# What distinguishes cells, where a table has it; columns with a dot are keys of the configuration.
KEYS = ("width", "layers", "body_parameters", "parameters", "vocab", "context", "mixer", "schedule")
KEYS += ("average_parameters", "tokens", BATCH, "seed")
# Keys that set the rate, or follow from the rate, the batch and the tokens.
RATE_KEYS = ("schedule.peak_learning_rate",)
BATCH_KEYS = ("data.batch_size", "steps", "run.length", "run.accumulation")


@dataclasses.dataclass(frozen=True)
class Selected:
    """`columns` [rows] for a fit. `trunks` are the trunks of every row; rows that share one are not
    independent. `left_out` has one sentence for each cell or group of rows that is not selected.
    """

    columns: Mapping[str, np.ndarray]
    trunks: tuple[frozenset[str], ...]
    left_out: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.trunks)


def select(table: Table, kind: Selection, diverged: Table | None = None) -> Selected:
    """The rows of a finished table by one of the four selections. `diverged` are the rows of the
    same sweep without a loss.

    Raises:
      UserError: nothing remains.
    """
    selected = _WAYS[kind](table, diverged)
    if not len(selected):
        first = selected.left_out[-1] if selected.left_out else "it is empty"
        raise UserError(
            f"{table.name}: nothing remains of {len(table)} rows ({first}); widen the grid of "
            "learning rates"
        )
    return selected


def clusters(trunks: Sequence[frozenset[str]]) -> np.ndarray:
    """A number for each row [rows]; rows that a chain of shared trunks connects get the same."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for names in trunks:
        first, *others = sorted(names)
        for other in others:
            parent[root(other)] = root(first)
    roots = [root(min(names)) for names in trunks]
    order = {name: i for i, name in enumerate(dict.fromkeys(roots))}
    return np.array([order[name] for name in roots])


def _all_rows(table: Table, _: Table | None) -> Selected:
    return Selected(table.columns, _trunks(table), table.left_out)


def _vertices(table: Table, diverged: Table | None) -> Selected:
    keys = _keys(table, without=(RATE, *RATE_KEYS))
    found: list[tuple[np.ndarray, int, float, float]] = []
    left_out = list(table.left_out)
    walls = _walls(diverged, keys)
    for key, places in _groups(table, keys).items():
        rates, losses = _by_rate(table, places)
        best = int(np.argmin(losses))
        if (reason := _edge(rates, best, walls.get(key, ()))) is not None:
            left_out.append(f"{_described(table, places[0], keys)}: {reason}")
            continue
        x, y = np.log(rates[best - 1 : best + 2]), losses[best - 1 : best + 2]
        curvature, slope, height = np.polyfit(x - x[1], y, 2)
        at = -slope / (2 * curvature)
        vertex = float(np.exp(x[1] + at)), float(height + 0.5 * slope * at)
        found.append((places, int(places[0]), *vertex))
    rows = np.array([row for _, row, _, _ in found], dtype=int)
    columns = {name: values[rows] for name, values in table.columns.items()}
    columns[RATE] = np.array([rate for _, _, rate, _ in found])
    columns[LOSS] = np.array([loss for _, _, _, loss in found])
    trunks = _trunks(table)
    joined = tuple(frozenset[str]().union(*(trunks[i] for i in places)) for places, *_ in found)
    return Selected(columns, joined, tuple(left_out))


def _near(table: Table, diverged: Table | None) -> Selected:
    return _of_cells(table, diverged, lambda losses: losses <= (1 + NEAR) * losses.min())


def _best(table: Table, diverged: Table | None) -> Selected:
    return _of_cells(table, diverged, lambda losses: np.arange(len(losses)) == np.argmin(losses))


def _of_cells(
    table: Table, diverged: Table | None, is_kept: Callable[[np.ndarray], np.ndarray]
) -> Selected:
    """The rows for each (size, tokens, seed), over rates and batches. A cell with a single rate has
    no edge: its recipe is fixed.
    """
    keys = _keys(table, without=(RATE, *RATE_KEYS, BATCH, *BATCH_KEYS))
    left_out, kept = list(table.left_out), []
    narrow = (*keys, *((BATCH,) if BATCH in table.columns else ()))
    walls = _walls(diverged, narrow)
    for places in _groups(table, keys).values():
        losses = table.columns[LOSS][places]
        best = places[int(np.argmin(losses))]
        # The edge is that of the rates trained at the batch with the lowest loss.
        near_by = [p for p in places if _key(table, narrow, p) == _key(table, narrow, best)]
        rates, of_rate = _by_rate(table, np.array(near_by))
        reason = None
        if len(rates) > 1:
            wall = walls.get(_key(table, narrow, best), ())
            reason = _edge(rates, int(np.argmin(of_rate)), wall)
        if reason is not None:
            left_out.append(f"{_described(table, best, narrow)}: {reason}")
            continue
        kept += list(places[is_kept(losses)])
    taken = table.take(np.array(kept, dtype=int))
    return Selected(taken.columns, _trunks(table, kept), tuple(left_out))


_WAYS: Mapping[str, Callable[[Table, Table | None], Selected]] = {
    "vertex": _vertices,
    "near": _near,
    "best": _best,
    "rows": _all_rows,
}


def _keys(table: Table, without: Sequence[str]) -> tuple[str, ...]:
    dotted = [name for name in table.columns if "." in name]
    names = [name for name in KEYS if name in table.columns] + dotted
    return tuple(name for name in names if name not in without)


def _key(table: Table, keys: Sequence[str], row: int) -> tuple[object, ...]:
    return tuple(str(table.columns[name][row]) for name in keys)


def _described(table: Table, row: int, keys: Sequence[str]) -> str:
    """A row, named by the keys that have more than one value in the table."""
    varying = [key for key in keys if len({str(x) for x in table.columns[key]}) > 1]
    return spoken(table.columns, row, varying) or "the only cell"


def _groups(table: Table, keys: Sequence[str]) -> dict[tuple[object, ...], np.ndarray]:
    """The indices of the rows of each cell, in the order of the table."""
    found: dict[tuple[object, ...], list[int]] = {}
    for row in range(len(table)):
        found.setdefault(_key(table, keys, row), []).append(row)
    return {key: np.array(places) for key, places in found.items()}


def _walls(diverged: Table | None, keys: Sequence[str]) -> dict[tuple[object, ...], np.ndarray]:
    """The rates of each cell at which training diverged."""
    if diverged is None or not len(diverged) or not set(keys) <= diverged.columns.keys():
        return {}
    groups = _groups(diverged, keys)
    return {key: diverged.columns[RATE][places] for key, places in groups.items()}


def _by_rate(table: Table, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rates of a cell, ascending, and the mean loss at each."""
    rates, inverse = np.unique(table.columns[RATE][places], return_inverse=True)
    losses = table.columns[LOSS][places]
    return rates, np.bincount(inverse, weights=losses) / np.bincount(inverse)


def _edge(rates: np.ndarray, best: int, diverged: Sequence[float] | np.ndarray) -> str | None:
    """Why the optimum of a cell does not lie between its rates, or None."""
    if len(rates) < 3:
        return f"{len(rates)} learning rates have no lowest between two others; train three or more"
    if 0 < best < len(rates) - 1:
        return None
    side, word = ("smallest", "smaller") if best == 0 else ("largest", "larger")
    higher = [rate for rate in diverged if rate > rates[best]]
    if best and higher:
        return (
            f"the lowest loss is at learning_rate={rates[best]:.4g}, next to the diverged "
            f"{min(higher):.4g}; train rates between them"
        )
    return f"the lowest loss is at the {side} learning_rate={rates[best]:.4g}; train {word} ones"


def _trunks(table: Table, places: Sequence[int] | None = None) -> tuple[frozenset[str], ...]:
    """The trunk of every row; its cell or the row itself where the table names none."""
    named = next((n for n in ("trunk", "cell") if n in table.columns), None)
    rows = range(len(table)) if places is None else places
    names = table.columns[named] if named else None
    return tuple(frozenset([f"row {i}" if names is None else str(names[i])]) for i in rows)
