"""A forecast and its score as one row of a table (lm/studies/forecast.py makes them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = ("law", "rows", "FLOPs of the largest", "FLOPs of the run", "times", "predicted loss")
HEAD += ("95 % interval", "written", "loss of the run", "error", "inside")


def row(values: Mapping[str, Any]) -> tuple[str, ...]:
    """One forecast, as stored in its file, under HEAD."""
    found, scored = values["forecast"], values["score"]
    message = ("not run yet", "", "")
    if scored is not None:
        inside = "yes" if scored["is_inside"] else "no"
        message = (f"{scored['loss']:.4f}", f"{scored['error']:+.4f}", inside)
    return (
        found["law"],
        str(found["rows"]),
        f"{found['largest_compute']:.3g}",
        f"{found['compute']:.3g}",
        f"{found['times']:.3g}",
        f"{found['loss']:.4f}",
        f"{found['low']:.4f} to {found['high']:.4f}",
        values["date"][:16].replace("T", " "),
        *message,
    )
