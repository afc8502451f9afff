"""The page of a comparison: verdicts first, then curves, recall against state, speed, every number.

Everything is drawn from compare.json (lm/report/compared.py), so a committed file reproduces its
page.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from lm.evaluation.scoring import Cost
from lm.report import legends, log_axes, recall, verdicts
from lm.report.compared import Comparison, Row
from lm.report.figures import PALETTE, canvas
from lm.report.page import (
    Html,
    amount,
    card,
    document,
    drawing,
    duration,
    fact,
    section,
    table,
    text,
)

FEWEST = 64  # smallest position drawn: those below hold too few tokens for a curve
MOST_COLUMNS = 12  # in the table of a curve; longer curves are only drawn


def page(found: Comparison) -> str:
    """A comparison as one offline HTML page."""
    rows = found.rows
    head = (
        f'<header><h1>{text(found.question)}</h1><div class="soft">'
        f"{text(_subtitle(found))}</div></header>\n"
    )
    drawn, narrow = figures(found), figures(found, wide=())
    pictures = "".join(
        drawing(drawn[name], narrow[name] if name in WIDE else "", title=title, note=note)
        for name, (title, note) in TITLES.items()
        if name in drawn
    )
    sections = [
        head,
        _cards(found),
        section("Verdicts", verdicts.cards(found)),
        section("Speed-up", verdicts.speed_up(found)),
        section("Curves", f'<div class="figures">{pictures}</div>'),
        section("Cost", table(*_speed(rows))),
        section("Recall against state", _recall(drawn, narrow)),
        section("Tasks", "".join(_task(rows, label) for label in rows[0].tasks)),
        section("Other differences", verdicts.differences(found)),
        section("Made with", table([[key, Html(fact(x))] for key, x in _facts(found).items()])),
    ]
    return document(found.question, "".join(sections), "Espalier comparison")


def markdown(found: Comparison) -> str:
    """A comparison as Markdown: verdicts, results, costs, curves."""
    return f"# {found.question}\n\n{_subtitle(found)}\n\n{tables(found)}"


def tables(found: Comparison) -> str:
    """The body of `markdown`, without its title."""
    rows = found.rows
    lines = [f"- {verdict.sentence}" for verdict in found.verdicts] or [f"- {verdicts.NO_PRIMARY}"]
    for title, (body, head) in (
        ("Results", _results(rows)),
        (f"Speed-up: {verdicts.SPEED_UP.format(rows[0].pattern)}", verdicts.speed_ups(found)),
        ("Cost", _speed(rows)),
        *(
            (f"{label}: {word}", _curve_table(rows, label, word))
            for label, word in _curves(rows)
            if len(curve(rows[0], label, word)[0]) <= MOST_COLUMNS
        ),
        (f"Other differences: {verdicts.DIFFERENCES}", verdicts.difference_table(found)),
    ):
        if not body:
            continue
        lines += ["", f"**{title}**", "", _markdown_table(body, head)]
    if found.recall:
        lines += ["", "**Recall against state**", "", recall.table(found.recall)]
    return "\n".join(lines).strip() + "\n"


# name of the figure -> title, note
TITLES = {
    "loss": (
        "Training",
        "bits per byte of training text; mean over seeds, the band from least to most; the top is "
        "cut off: the first eighth of the training may lie above it",
    ),
    "length": ("Length", "loss of the same targets with growing context, nats per token"),
    "reading": ("Reading on", "loss by position in a long window, nats per token"),
    "position": ("Position", "loss by position in the document, nats per token"),
    "copy": ("Copying against state", "up and left is better"),
    "decode": ("Decoding", "milliseconds per token against context"),
}


WIDE = ("loss", "reading")


def figures(found: Comparison, wide: Collection[str] = WIDE) -> dict[str, str]:
    """Name -> SVG, for the figures that have data. `wide`: names of those that span the
    page; if there are none, the panels of recall lie below each other.
    """
    rows = found.rows
    drawn: dict[str, str] = {"loss": _draw("loss", rows, _loss, is_wide="loss" in wide)}
    for name, label, word in (
        ("length", "length", "context"),
        ("reading", "length", "position"),
        ("position", "position", "loss"),
    ):
        if (label, word) in _curves(rows):
            put = lambda axes, row, ink, label=label, word=word: _points(
                axes, row, ink, label, word
            )
            drawn[name] = _draw(name, rows, put, is_wide=name in wide, log_x=True)
    if "forgetting" in rows[0].tasks:
        drawn["copy"] = _draw("copy", rows, _state, log_x=True)
    if rows[0].decode_seconds:
        drawn["decode"] = _draw("decode", rows, _decode, log_x=True)
    if found.recall:
        drawn["recall"] = recall.figure(found.recall, recall.PER_LINE if wide else 1)
    return drawn


def _draw(
    name: str,
    rows: Sequence[Row],
    put: Callable[[Axes, Row, str], None],
    *,
    is_wide: bool = False,
    log_x: bool = False,
) -> str:
    with canvas(TITLES[name][0], is_wide) as (axes, finish):
        for row, ink in zip(rows, _inks(rows), strict=True):
            put(axes, row, ink)
        axes.margins(x=0.02)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(AXES[name])
        legends.below(finish.figure, legends.named(axes))
        return finish()


AXES = {
    "loss": "tokens",
    "length": "tokens of context",
    "reading": "position",
    "position": "position",
    "copy": "bytes of state per row",
    "decode": "tokens in the state",
}


def _power(value: float) -> str:
    """2048 -> "2K"."""
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"


def _inks(rows: Sequence[Row]) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(len(rows))]


def _loss(axes: Axes, row: Row, ink: str) -> None:
    if row.curve is None:  # not trained
        return
    tokens, bits = np.array(row.curve.tokens), np.array(row.curve.bits)
    axes.fill_between(tokens, bits.min(0), bits.max(0), color=ink, alpha=0.2, linewidth=0)
    axes.plot(tokens, bits.mean(0), color=ink, label=row.pattern)
    low = bits[:, len(tokens) // 8 :]  # the first steps would flatten the rest
    low = low[np.isfinite(low)]
    top = max(axes.get_ylim()[1] if len(axes.lines) > 1 else 0.0, low.max(initial=0.0) * 1.02)
    axes.set_ylim(top=top or None)


def _points(axes: Axes, row: Row, ink: str, label: str, word: str) -> None:
    at, values = curve(row, label, word)
    keep = at >= (FEWEST if word == "position" else 1)
    at, values = at[keep], values[:, keep]
    axes.fill_between(at, values.min(0), values.max(0), color=ink, alpha=0.15, linewidth=0)
    axes.plot(at, values.mean(0), color=ink, marker="o", markersize=3, label=row.pattern)


def _state(axes: Axes, row: Row, ink: str) -> None:
    values = row.tasks["forgetting"].headlines
    state = next(iter(row.state_bytes.values()))
    spread = [[values.mean() - values.min()], [values.max() - values.mean()]]
    axes.errorbar(
        [state], [values.mean()], yerr=spread, color=ink, fmt="o", capsize=3, label=row.pattern
    )
    axes.set_ylabel("tokens copied")


def _decode(axes: Axes, row: Row, ink: str) -> None:
    at = list(row.decode_seconds)
    values = [1e3 * x for x in row.decode_seconds.values()]
    axes.plot(at, values, color=ink, marker="o", markersize=3, label=row.pattern)
    log_axes.scale(axes, "y", log_axes.heights(axes))


def curve(row: Row, label: str, word: str) -> tuple[np.ndarray, np.ndarray]:
    """The curve `word@x` of a task: x [n] and values [seeds, n]."""
    task = row.tasks[label]
    first = task.seeds[0].numbers
    names = [name for name in first if name.partition("@")[0] == word and "@" in name]
    at = np.array([float(name.partition("@")[2]) for name in names])
    order = np.argsort(at)
    return at[order], np.stack([task.values(name) for name in names], axis=1)[:, order]


def _curves(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """All curves, as (task, word)."""
    found = {
        (label, name.partition("@")[0]): None
        for label, task in rows[0].tasks.items()
        for name in task.seeds[0].numbers
        if "@" in name
    }
    return list(found)


def _recall(drawn: Mapping[str, str], narrow: Mapping[str, str]) -> str:
    if "recall" not in drawn:
        return ""
    note = "multi-query associative recall, learnt by small models of each mixer; answers right"
    return f'<p class="soft small">{text(note)}</p>' + drawing(drawn["recall"], narrow["recall"])


def _subtitle(found: Comparison) -> str:
    rows, seeds = found.rows, found.seeds
    return (
        f"{len(rows)} patterns × {len(seeds)} seeds, {amount(found.tokens)} tokens each, "
        f"{amount(rows[0].parameters)} parameters outside the embedding"
    )


def _cards(found: Comparison) -> str:
    ranked = _ranked(found.rows)
    fast = max(found.rows, key=lambda row: row.tokens_per_second)
    small = min(found.rows, key=lambda row: next(iter(row.state_bytes.values())))
    bits = [f"{row.tasks['bits_per_byte'].headlines.mean():.4f}" for row in ranked]
    if said := verdicts.of_bits(found, ranked[0].pattern):
        cards = card("least bits per byte", ranked[0].pattern, f"{bits[0]}; {said}")
    else:  # the lowest mean is not a winner
        every = [f"{row.pattern} {value}" for row, value in zip(ranked, bits, strict=True)]
        cards = card("bits per byte", "no verdict", ", ".join(every))
    cards += card("fastest training", fast.pattern, f"{amount(fast.tokens_per_second)} tokens/s")
    state = next(iter(small.state_bytes.values()))
    cards += card("smallest state", small.pattern, amount(state, "B"))
    return f'<div class="cards">{cards}</div>\n'


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows by bits per byte, lowest first; what is not finite comes last."""
    key = lambda row: np.nan_to_num(row.tasks["bits_per_byte"].values("bpb").mean(), nan=np.inf)
    return sorted(rows, key=key)


def _results(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    """The headline of every task: mean over seeds (seeds: each). One row per pattern, best bits
    first; or one row per task if there are more tasks than patterns.
    """
    ranked, tasks = _ranked(rows), rows[0].tasks
    heads = [f"{label} {task.headline}" for label, task in tasks.items()]
    cells = [[row.pattern, *(_headline(row, label) for label in tasks)] for row in ranked]
    whole = [["pattern", *heads], *cells]
    if len(tasks) > len(rows):
        whole = [list(line) for line in zip(*whole, strict=True)]
        whole[0][0] = "task"
    return whole[1:], whole[0]


def _headline(row: Row, label: str) -> str:
    task = row.tasks[label]
    values = task.headlines
    chance = all(seed.numbers[task.headline].is_at_chance for seed in task.seeds)
    # Labeled, for two values in parentheses look like an interval.
    shown = f"{values.mean():.4f} (seeds: {', '.join(f'{x:.4f}' for x in values)})"
    return shown + (" at chance" if chance else "")


def _speed(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    contexts = list(rows[0].decode_seconds)
    states = list(rows[0].state_bytes)
    states = list(dict.fromkeys((states[0], states[-1])))
    head = ["pattern", "parameters", "layers", "ffn", "train tokens/s", "peak memory"]
    head += ["MFLOP a token"]
    head += [f"state at {c:,}" for c in states]
    head += [f"decode ms at {c:,}" for c in contexts]
    body = []
    for row in rows:
        cells = [row.pattern, f"{row.parameters:,}", str(row.num_layers)]
        cells += [str(row.ffn_dim), f"{row.tokens_per_second:,.0f}"]
        cells += [amount(row.peak_bytes, "B") if row.peak_bytes else "-"]
        cells += [f"{row.flops_per_token / 1e6:.2f}"]
        cells += [amount(row.state_bytes[c], "B") for c in states]
        cells += [f"{1e3 * row.decode_seconds[c]:.2f}" for c in contexts]
        body.append(cells)
    return body, head


def _curve_table(rows: Sequence[Row], label: str, word: str) -> tuple[list[list[str]], list[str]]:
    head = ["pattern", *(f"{x:,g}" for x in curve(rows[0], label, word)[0])]
    body = []
    for row in rows:
        values = curve(row, label, word)[1].mean(0)
        body.append([row.pattern, *(f"{x:.3f}" for x in values)])
    return body, head


def _task(rows: Sequence[Row], label: str) -> str:
    """Every number of a task: mean over seeds, and the interval of the first seed."""
    names = list(rows[0].tasks[label].seeds[0].numbers)
    body = []
    for name in names:
        cells = [name]
        for row in rows:
            values = row.tasks[label].values(name)
            first = row.tasks[label].seeds[0].numbers[name]
            chance = ", at chance" if first.is_at_chance else ""
            note = text(f"({first.interval('.3g')}{chance})")
            cells.append(Html(f'{values.mean():.4g} <span class="soft small">{note}</span>'))
        body.append(cells)
    total = Cost()
    for seed in (seed for row in rows for seed in row.tasks[label].seeds):
        total += seed.cost or Cost()
    note = (
        f"{amount(total.tokens)} tokens, {amount(total.flops, 'FLOP')}, "
        f"{duration(total.seconds)} in all; intervals are of the first seed"
    )
    shown = table(body, ["", *(row.pattern for row in rows)])
    return f"<details><summary>{text(label)}: {text(note)}</summary>{shown}</details>\n"


def _facts(found: Comparison) -> dict[str, Any]:
    facts = dict(found.facts)
    if "date" in facts:
        facts["date"] = str(datetime.datetime.fromisoformat(facts["date"]).date())
    return facts | {"seeds": ", ".join(map(str, found.seeds))}


def _markdown_table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    lines = [list(map(text, cells)) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
