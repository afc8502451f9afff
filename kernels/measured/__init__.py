"""What `espalier tune` found out about the kernels on a device: which ones win, with which tiles.

There is one JSON file per device kind. `evidence` is "measured" (seconds on that device) or
"modelled" (the compiler's memory and the chip's peak rates, where no such device was available).
A row is one problem:

    op, form, options, dims, dtype      the problem
    blocks                              the fastest tiles of the form
    ratio                               time of the form over that of chunked: forward, both
    peak                                bytes of the form over those of chunked: forward, both
    wins                                no ratio is above 1; where modelled, the peak of both
                                        passes is not above 1 either

`auto` takes a kernel only where a row says that it wins. Without a file it never takes one.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent


class Row(NamedTuple):
    """One problem; the fields are described above."""

    op: str
    form: str
    options: Mapping[str, Any]
    dims: Mapping[str, int]
    dtype: str
    blocks: Mapping[str, int]
    ratio: Mapping[str, float]
    peak: Mapping[str, float]
    wins: bool


class Table(NamedTuple):
    """All rows of one device kind, and the kind of evidence for them."""

    device_kind: str
    evidence: str
    rows: tuple[Row, ...]


def path(device_kind: str) -> Path:
    """The file of a device kind: "NVIDIA H200" -> nvidia_h200.json."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


@cache
def table(device_kind: str) -> Table | None:
    """What is known about a device kind, or None."""
    file = path(device_kind)
    if not file.exists():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    rows = tuple(Row(**{name: row[name] for name in Row._fields}) for row in values["rows"])
    return Table(values["device_kind"], values["evidence"], rows)


def tables() -> list[Table]:
    """The tables of all device kinds that have a file."""
    kinds = (
        json.loads(p.read_text(encoding="utf-8"))["device_kind"] for p in FOLDER.glob("*.json")
    )
    return [found for kind in sorted(kinds) if (found := table(kind)) is not None]


def wins(op: str, form: str) -> list[str]:
    """How many of its rows a form wins, one sentence for every device kind that has rows of it:
    "measured on NVIDIA H200: 5 of 8 problems".
    """
    found = []
    for known in tables():
        rows = [row for row in known.rows if (row.op, row.form) == (op, form)]
        if rows:
            count = sum(row.wins for row in rows)
            where = f"{known.evidence} on {known.device_kind}"
            found.append(f"{where}: {count} of {len(rows)} problems")
    return found


def find(
    known: Table | None,
    op: str,
    form: str | None,
    dims: Mapping[str, int],
    dtype: str,
    options: Mapping[str, Any],
) -> Row | None:
    """The row nearest to a problem: it has the same op and dtype and matches in every option that
    it names; of those, the nearest head widths win, then the nearest length.
    """
    fitting = [
        row
        for row in (known.rows if known else ())
        if row.op == op
        and form in (None, row.form)
        and row.dtype == dtype
        and all(options.get(name) == value for name, value in row.options.items())
    ]

    def distance(row: Row) -> tuple[float, float]:
        width = sum(abs(row.dims[x] - dims[x]) for x in "KV" if x in row.dims and x in dims)
        # Where the problem has no length, the longest row decides.
        time = abs(row.dims["T"] - dims["T"]) if "T" in dims else -row.dims["T"]
        return width, time

    return min(fitting, key=distance, default=None)


def reason(known: Table, row: Row) -> str:
    """Why `auto` takes the form of a row."""
    times = ", ".join(f"{name} {value:.2f}" for name, value in row.ratio.items())
    return f"{known.evidence} on {known.device_kind} over chunked: {times}"
