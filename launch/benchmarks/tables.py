"""Result files as Markdown: where and how the numbers were measured, then a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.benchmarks import markdown
from lm.targets import parse

PROGRAM = ("device", "K", "setting", "arguments", "outputs", "temporary", "kept", "peak")
PROGRAM += ("on chip", "registers", "spilled", "model")


def render(values: dict[str, Any], op: str = "") -> str:
    """A result file as Markdown: where and how the numbers were measured, then a row for each.

    `op`: for a file of `--cases=compiled`, only the programs of this op with gradients.
    """
    where = f"`{values['command']}` at {values['commit'][:10]}, {values['cpu']}"
    where += f" ({values['cores']} cores), {values['date'][:10]}"
    if "rows" in values:  # tested before "recall": a comparison may hold both
        from lm.report import compared, comparison

        return f"{where}\n\n{comparison.tables(compared.from_mapping(values))}"
    if "forecast" in values:
        from lm.report import forecast

        return f"{where}\n\n" + markdown.table(forecast.HEAD, iter([forecast.row(values)]))
    if "recall" in values:
        from lm.report import recall

        return f"{where}\n\n{recall.table(recall.rows_of(values['recall']))}"
    if "predicted" in values:
        from lm.report import predict_loss

        return f"{where}\n\n{predict_loss.table(values['predicted'])}"
    if "coord_check" in values:
        from lm.report import coord_check

        return f"{where}\n\n{coord_check.table(coord_check.curves_of(values['coord_check']))}"
    if "transfers" in values:
        from lm.report import lr_transfer

        return f"{where}\n\n{lr_transfer.table(lr_transfer.of_plain(values['transfers']))}"
    if "searched" in values:
        from lm.report import autolrs

        return f"{where}\n\n{autolrs.summary(values)}"
    if "regrets" in values:
        from lm.report import regret

        return f"{where}\n\n{regret.table(values['regrets'])}"
    if "equations" in values:
        from lm.report import fit

        return f"{where}\n\n{fit.markdown(values)}"
    if values.get("results", [{"name": ""}])[0]["name"].startswith("sent/"):
        from launch.benchmarks import sequence_page

        return f"{where}\n\n{sequence_page.table(values['results'])}"
    if op:
        chosen = [r for r in values["results"] if r["facts"]["op"] == op]
        return f"{where}\n\n" + markdown.table(PROGRAM, programs(chosen, ("both",)))
    rows = [_bench(r) for r in values["results"]] if "results" in values else _run(values)
    head = ("what", "value", "goal") if "results" in values else ("", "")
    return f"{where}\n\n" + markdown.table(head, iter(rows))


def pictures(root: Path) -> dict[str, str]:
    """The figures of docs/ that are drawn from result files, as SVG text by file name."""
    from launch.benchmarks import sequence_page
    from lm.report.figures import standalone

    values = json.loads((root / "results/bench/sequence.json").read_text(encoding="utf-8"))
    return {"docs/sequence.svg": standalone(sequence_page.figure(values["results"]))}


def programs(
    results: Sequence[Mapping[str, Any]], passes: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """A row of `PROGRAM` for each compiled program: MB, the peak as a multiple of arguments,
    outputs and what is kept, KB of the chip's memory, registers of a thread and bytes it spills
    (the most that one of its kernels takes), and microseconds by the model.
    """
    for result in results:
        facts = result["facts"]
        label, which = facts["name"].split("/")
        if which not in passes:
            continue
        _, width, *setting = label.split()
        sizes = [f"{facts[key] / 1e6:.1f}" for key in ("argument", "output", "temp", "kept")]
        most = [
            "" if None in found else f"{max(found) // unit:,}"
            for key, unit in (("memory", 1024), ("registers", 1), ("spilled", 1))
            for found in [[kernel[key] for kernel in facts["kernels"]]]
        ]
        device = parse(facts["target"]).chip.name
        peak = f"{result['value']:.2f}{markdown.missed(result)}"
        model = f"{facts['seconds'] * 1e6:.0f}"
        yield device, width[1:], " ".join(setting), *sizes, peak, *most, model


def _bench(result: dict[str, Any]) -> tuple[str, str, str]:
    goal = result["goal"]
    wanted = "" if goal is None else f"{goal['relation']} {goal['bound']:g}"
    value = "refused" if result["value"] is None else f"{result['value']:.3g}"
    return result["name"], value, wanted + markdown.missed(result)


def _run(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in values["numbers"].items()]
