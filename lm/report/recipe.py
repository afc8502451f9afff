"""A recipe (lm/studies/recipe.py) as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 110  # columns of a table; a narrower table breaks every cell
CHOSEN = (
    "model.width",
    "model.num_layers",
    "data.tokenizer.vocab_size",
    "data.batch_size",
    "run.length",
    "schedule.family",
    "schedule.peak_learning_rate",
    "schedule.warmup",
    "schedule.decay",
    "mup.residual_multiplier",
)


def show(values: Mapping[str, Any], console: Console) -> None:
    """Prints a recipe: the budget, the laws, how far they differ, multipliers, what was chosen, and
    what lies outside a law's domain.
    """
    asked = values["budget"]
    console.print(
        f"{asked['flops']:.3g} FLOPs = 6 x {asked['parameters']:.3g} parameters (without "
        f"embeddings) x {asked['tokens']:.3g} tokens\n"
    )
    laws = (
        (
            row["quantity"],
            row["law"],
            f"{row['value']:.4g} {row['unit']}",
            row["tag"],
            "outside its domain" if row["notes"] else "",
        )
        for row in values["laws"]
    )
    _table(console, ("quantity", "law", "value", "evidence", ""), laws)
    spreads = (
        (x["quantity"], f"{x['least']:.4g}", f"{x['middle']:.4g}", f"{x['times']:.3g} x")
        for x in values["spreads"]
    )
    _table(console, ("laws apart", "least", "middle", "largest over least"), spreads)
    _table(
        console,
        ("multiplier", "value"),
        ((name, f"{x:.4g}") for name, x in values["multipliers"].items()),
    )
    _table(console, ("the recipe", ""), ((key, _value(values["config"], key)) for key in CHOSEN))
    for message in values["warnings"]:
        console.print(f"warning: {message}")


def _value(config: Mapping[str, Any], key: str) -> str:
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return str(node)


def _table(console: Console, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in head:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
