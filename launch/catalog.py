"""Lists ops, mixers and all that a configuration can name.

    espalier catalog [--config=base] [--out=catalog.json]

The tables show the forms, mixers, state and proofs of each op; the cost of a layer of each mixer,
with the sizes of --config; and the options of everything else that a key of the configuration can
name. --out writes the tables as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from launch import cli, presets

WIDTH = 160  # columns of a table; a narrower one would wrap every cell

ROOT = Path(__file__).resolve().parent.parent

_CONFIG = flags.DEFINE_string("config", presets.BASE, "configuration with the sizes of a layer")
_OUT = flags.DEFINE_string("out", "", "JSON file to write")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    base = cli.read_config_file(_CONFIG.value).to_dict()
    from lm import files
    from lm.studies import catalog

    mixers = catalog.mixers(base)
    members = catalog.members()
    forms = catalog.forms(mixers, catalog.read_proofs(ROOT / "kernels" / "proofs"))
    if _OUT.value:
        tables = {"forms": forms, "mixers": mixers, "members": members}
        rows = {name: [row._asdict() for row in found] for name, found in tables.items()}
        files.replace(cli.path("out", _OUT.value), json.dumps(rows, indent=1) + "\n")
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, WIDTH)
    console.print(_table("ops and forms", forms))
    width = base["model"]["width"]
    console.print(_table(f"mixers, one layer of width {width}, state in bytes a row", mixers))
    console.print(_table("what a key of the configuration may name, and its options", members))


def _table(title: str, rows: list[Any]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", show_lines=False)
    for name in rows[0]._fields:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(f"{x:,.0f}" if isinstance(x, int | float) else x for x in row))
    return table


if __name__ == "__main__":
    cli.run(main)
