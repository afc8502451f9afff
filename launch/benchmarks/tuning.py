"""Finds the fastest tiles of a kernel on a device, and whether the kernel beats the chunked form.

A measured kernel wins if neither pass is slower than chunked. A modelled one must also take no more
memory in a training step, since modelled time is too weak a reason to spend memory. The model
counts the bytes that a program holds and not those that the loops of a chunked form move, so it
favours chunked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import forms
from launch.benchmarks.forms import BASELINE, Costs
from lm.config import UserError, nearest
from lm.targets import Chip

TRIALS = 3  # runs of each candidate, before the best is compared with chunked
KERNEL = "kernel"

Sides = Mapping[str, tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Absent:
    """A device that is not here: `place` stands for it in its compiler."""

    chip: Chip
    place: Any
    evidence = "modelled"

    @property
    def device_kind(self) -> str:
        return self.chip.device_kind

    @property
    def platform(self) -> str:
        return self.chip.platform

    def head(self) -> dict[str, Any]:
        return {"device_kind": self.device_kind, "evidence": self.evidence}

    def costs(self, name: str, case: Case, sides: Sides, trials: int) -> dict[str, Costs]:
        """A side that the compiler refuses is left out."""
        del trials
        found = {}
        for side, (form, blocks) in sides.items():
            try:
                found[side] = forms.modelled(name, case, form, blocks, self.chip, self.place)
            except jax.errors.JaxRuntimeError:
                continue
        return found


@dataclasses.dataclass(frozen=True)
class Here:
    """The first device of this machine."""

    device_kind: str
    platform: str
    pairs: int
    evidence = "measured"

    def head(self) -> dict[str, Any]:
        return {"device_kind": self.device_kind, "evidence": self.evidence, "pairs": self.pairs}

    def costs(self, name: str, case: Case, sides: Sides, trials: int) -> dict[str, Costs]:
        """A side that does not compile or does not fit is left out."""
        return forms.measured(name, case, sides, trials or self.pairs)


def here(pairs: int) -> Here:
    """The first device that JAX finds."""
    return Here(jax.devices()[0].device_kind, jax.default_backend(), pairs)


def names(place: Absent | Here, asked: Sequence[str]) -> list[str]:
    """The ops to tune.

    Raises:
      UserError: an op of `asked` does not exist or has no kernel for the device, or no op has one.
    """
    able = [name for name in dispatch.names() if forms.kernel(name, place.platform)]
    if not able:
        raise UserError(
            f"no op has a kernel for {place.platform}, so there is nothing to tune for "
            f"{place.device_kind}; set --target to a machine such as v5e-1"
        )
    for name in asked:
        if name not in dispatch.names():
            raise UserError(f"--ops: no op {name!r}; {nearest(name, dispatch.names())}")
        if name not in able:
            raise UserError(
                f"--ops: {name} has no kernel for {place.platform}; choose from {', '.join(able)}"
            )
    return list(asked) or able


def kept(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file that are about other ops.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if row["op"] not in names]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it or name another --out") from None


def rows(
    place: Absent | Here, names: Sequence[str], show: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """A row of kernels/measured for every problem that the kernel takes."""
    for name, case in forms.problems(names):
        form = forms.kernel(name, place.platform)
        assert form is not None
        show(f"{name} {case.name}")
        if forms.refusal(name, case, form, place.platform) is None:
            yield _row(place, name, case, form)


def _row(place: Absent | Here, name: str, case: Case, form: str) -> dict[str, Any]:
    op = dispatch.get(name)
    # A model of bytes and FLOPs gives the same seconds for all tiles.
    is_modelled = place.evidence == "modelled"
    tiles = (op.default_blocks(form),) if is_modelled else op.candidate_blocks(form)
    candidates = {str(blocks): (form, blocks) for blocks in tiles}
    tried = place.costs(name, case, candidates, TRIALS)
    row: dict[str, Any] = {
        "op": name,
        "form": form,
        "options": dict(case.options),
        "dims": dict(case.dims),
        "dtype": case.dtype,
        "tried": {side: _costs(costs) for side, costs in tried.items()},
        "refused": sorted(candidates.keys() - tried.keys()),
    }
    if not tried:
        return row | {"blocks": {}, "ratio": {}, "peak": {}, "wins": False}
    best = min(tried, key=lambda side: (tried[side].both.seconds, tried[side].both.peak))
    sides = {BASELINE: (BASELINE, None)}
    if not is_modelled:  # timed again, in turn with chunked; a model would only repeat itself
        sides[KERNEL] = candidates[best]
    found = {KERNEL: tried[best]} | place.costs(name, case, sides, 0)
    ours = found[KERNEL]
    row |= {"blocks": dataclasses.asdict(candidates[best][1]), KERNEL: _costs(ours)}
    if BASELINE not in found:  # chunked does not compile or does not fit
        return row | {"ratio": {}, "peak": {}, "wins": True}
    theirs = found[BASELINE]
    ratio = {which: a.seconds / b.seconds for which, a, b in _pairs(ours, theirs)}
    peak = {which: a.peak / b.peak for which, a, b in _pairs(ours, theirs)}
    times = {BASELINE: _costs(theirs), "ratio": ratio, "peak": peak}
    return row | times | {"wins": wins(ratio, peak, place.evidence)}


def wins(ratio: Mapping[str, float], peak: Mapping[str, float], evidence: str) -> bool:
    """Whether `auto` takes the kernel. `ratio` and `peak`: its times and bytes over chunked's."""
    return max(ratio.values()) <= 1.0 and (evidence == "measured" or peak["both"] <= 1.0)


def _pairs(a: Costs, b: Costs) -> Iterator[tuple[str, Any, Any]]:
    yield from zip(Costs._fields, a, b, strict=True)


def _costs(costs: Costs) -> dict[str, Any]:
    return {which: cost._asdict() for which, cost in costs._asdict().items()}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table with a row for each problem."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("op", "options", "T", "K", "tiles", "time", "memory", "wins"):
        table.add_column(column)
    for row in rows:
        dims = row["dims"]
        times, peaks = (
            " / ".join(f"{x:.2f}" for x in row[key].values()) for key in ("ratio", "peak")
        )
        tiles = ", ".join(f"{k} {v}" for k, v in row["blocks"].items())
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        wins = "yes" if row["wins"] else "no"
        table.add_row(row["op"], options, str(dims["T"]), str(dims["K"]), tiles, times, peaks, wins)
    return table
