"""Two runs that should be the same computation: how far apart are their curves?"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lm.report.folder import Run

# Metrics that differ between two computers, or do not describe the computation.
NOT_COMPARED = ("time/", "memory/")


class Difference(NamedTuple):
    """The largest difference of a metric at one step, relative to the larger of both values."""

    relative: float
    step: int
    one: float
    other: float


def differences(one: Run, other: Run) -> dict[str, Difference]:
    """By metric, over the steps of both runs; infinite where only one value is finite."""
    theirs = {record["step"]: record for record in other.records}
    found: dict[str, Difference] = {}
    for record in one.records:
        match = theirs.get(record["step"], {})
        for key in record.keys() & match.keys():
            if key in ("step", "tokens") or key.startswith(NOT_COMPARED):
                continue
            here = _difference(record["step"], record[key], match[key])
            if here is not None and (key not in found or here.relative > found[key].relative):
                found[key] = here
    return dict(sorted(found.items()))


def _difference(step: int, one: Any, other: Any) -> Difference | None:
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return None
    if math.isfinite(one) != math.isfinite(other):
        return Difference(math.inf, step, one, other)
    if one == other or not math.isfinite(one):
        return Difference(0.0, step, one, other)
    scale = max(abs(one), abs(other))
    return Difference(abs(one - other) / scale, step, one, other)


def summary(one: Run, other: Run, judged: dict[str, Difference]) -> dict[str, Any]:
    """What a result file records about them."""
    steps = sorted({r["step"] for r in one.records} & {r["step"] for r in other.records})
    numbers = {"steps of both": f"{len(steps)}, the last is {steps[-1]}"}
    for key, x in judged.items():
        text = f"{x.relative:.1e} at step {x.step} ({x.one:.6f}, {x.other:.6f})"
        numbers[f"largest relative difference of {key}"] = text
    return {"numbers": numbers}
