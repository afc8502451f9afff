"""Result files as Markdown: where and how the numbers were taken, then a table."""

from __future__ import annotations

from typing import Any


def render(values: dict[str, Any]) -> str:
    """A result file as Markdown: where and how first, then one row a number."""
    where = f"`{values['command']}` at {values['commit'][:10]}, {values['cpu']}"
    where += f" ({values['cores']} cores), {values['date'][:10]}"
    if "rows" in values:  # before recall: a comparison may hold both
        from lm.report import comparison

        return f"{where}\n\n{comparison.tables(values)}"
    if "recall" in values:
        from lm.report import recall

        return f"{where}\n\n{recall.table(values['recall'])}"
    rows = [_bench(r) for r in values["results"]] if "results" in values else _run(values)
    head = (
        "| what | value | goal |\n|---|---|---|\n" if "results" in values else "| | |\n|---|---|\n"
    )
    return f"{where}\n\n{head}" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _bench(result: dict[str, Any]) -> tuple[str, str, str]:
    goal = result["goal"]
    wanted = "" if goal is None else f"{goal['relation']} {goal['bound']:g}"
    missed = "" if goal is None or goal["met"] else " (missed)"
    return result["name"], f"{result['value']:.3g}", wanted + missed


def _run(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in values["numbers"].items()]
