"""The report as HTML: headline numbers, curves, samples, and what the run was."""

from __future__ import annotations

import html
import itertools
import json
import math
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.config import flatten
from lm.report import figures
from lm.report.folder import Run
from lm.report.style import CSS

SAMPLES_SHOWN = 12
STACKED = 2  # columns that fit a phone


def render(
    runs: Sequence[Run], defaults: Mapping[str, Any] | None, pictures: Sequence[figures.Picture]
) -> str:
    """One self-contained page. `defaults`: a configuration; differences from it are shown."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        _head(runs, title),
        _cards(runs[0]) if len(runs) == 1 else _comparison(runs),
        section("Curves", _figures(runs, pictures)),
        section("Samples", "".join(_samples(run, len(runs) > 1) for run in runs)),
        section("Configuration", _configuration(runs, defaults)),
        *(_record(run, len(runs) > 1) for run in runs),
    ]
    return document(title, "".join(sections), "Espalier run report")


def document(title: str, body: str, footer: str) -> str:
    """`body` as a complete page, with its styles, readable offline."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)} · Espalier</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n<footer>{text(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def amount(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; numbers below a thousand keep their digits."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:#.3g}".rstrip(".") + f" {letter}{unit}"
    return f"{value:.4g}{' ' if unit else ''}{unit}"


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Html(str):
    """Markup that is not escaped."""

    __slots__ = ()


def text(value: object) -> str:
    return html.escape(str(value))


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>\n" if body else ""


def table(
    rows: Iterable[Sequence[object]],
    head: Sequence[object] = (),
    kind: str = "",
    marked: Collection[object] = (),
) -> str:
    """Cells are escaped unless they are `Html`. The first cell of a row is its heading; a row whose
    heading is in `marked` is highlighted. On a phone, a table of more than STACKED columns becomes
    one block per row, in which every cell repeats the heading of its column.
    """
    shown = lambda cell: cell if isinstance(cell, Html) else text(cell)
    # A long name may break after an underscore, so that many columns fit the page.
    cells = "".join(f"<th>{text(cell).replace('_', '_<wbr>')}</th>" for cell in head)
    lines = [f"<thead><tr>{cells}</tr></thead>" if head else "", "<tbody>"]
    is_stacked = len(head) > STACKED
    columns = [f' data-head="{text(cell)}"' for cell in head[1:]] if is_stacked else []
    for first, *rest in rows:
        mark = ' class="changed"' if first in marked else ""
        pairs = itertools.zip_longest(rest, columns[: len(rest)], fillvalue="")
        data = "".join(f"<td{column}>{shown(cell)}</td>" for cell, column in pairs)
        lines.append(f"<tr{mark}><th>{shown(first)}</th>{data}</tr>")
    kind = f"{kind} stacked".strip() if is_stacked else kind
    return f'<div class="box"><table class="{kind}">{"".join(lines)}</tbody></table></div>'


def drawing(broad: str, narrow: str = "", *, title: str = "", note: str = "") -> str:
    """A figure of the page from SVG elements. With `narrow` it spans the page, and a phone shows
    `narrow` in place of `broad`.
    """
    words = f'<h3>{text(title)}</h3><span class="soft small">{text(note)}</span>'
    caption = f"<figcaption>{words}</figcaption>" if title else ""
    if not narrow:
        return f"<figure>{caption}{broad}</figure>\n"
    both = f'<div class="broad">{broad}</div><div class="narrow">{narrow}</div>'
    return f'<figure class="wide">{caption}{both}</figure>\n'


def _head(runs: Sequence[Run], title: str) -> str:
    if len(runs) > 1:
        return f"<header><h1>{text(title)}</h1></header>\n<p></p>\n"
    facts, line = runs[0].facts, []
    if facts.get("layers"):
        mixers = dict.fromkeys(layer["mixer"] for layer in facts["layers"])
        line.append(f"{len(facts['layers'])} layers of {' and '.join(mixers)}")
    if facts.get("device_kind"):
        line.append(f"on {len(facts.get('devices', [0]))} × {facts['device_kind']}")
    if facts.get("started"):
        line.append(f"started {str(facts['started'])[:16].replace('T', ' ')}")
    soft = f'<div class="soft">{text(" · ".join(line))}</div>'
    return f"<header><h1>{text(title)}</h1>{soft}</header>\n"


def card(name: str, value: str, note: str = "", kind: str = "") -> str:
    return (
        f'<div class="card {kind}"><div class="name">{text(name)}</div>'
        f'<div class="value">{text(value)}</div><div class="note">{text(note)}</div></div>\n'
    )


def _cards(run: Run) -> str:
    cards = []
    for i, (name, bits) in enumerate(run.validation().items()):
        at = int(run.series(f"eval/{name}/bpb", over="step")[0][-1])
        kind = "first" if i == 0 else ""
        kind = kind if math.isfinite(bits) else "warn"
        cards.append(
            card(f"Validation, {name}", f"{bits:.4f}", f"bits per byte at step {at:,}", kind)
        )
    if not cards and (bits := run.last("train/bpb")) is not None:
        cards.append(card("Training", f"{bits:.4f}", "bits per byte, last step; no evaluation yet"))
    if run.records:
        last, planned = run.records[-1], run.facts.get("run_tokens")
        note = f"{last['step']:,} steps" + (f", planned {amount(planned)}" if planned else "")
        cards.append(card("Tokens", amount(last["tokens"]), note))
    if run.facts.get("parameters"):
        flops = run.facts.get("flops_per_token")
        note = f"{amount(flops, 'FLOP')} per token" if flops else ""
        cards.append(card("Parameters", amount(run.facts["parameters"]["total"]), note))
    if (rate := _median(run, "time/tokens_per_second")) is not None:
        cards.append(card("Throughput", amount(rate), "tokens per second, median"))
    if (seconds := run.training_seconds()) is not None:
        cards.append(card("Training time", duration(seconds), "compilation, evaluation left out"))
    if (mfu := _median(run, "time/mfu")) is not None:
        cards.append(card("MFU", f"{mfu:.1%}", "of the devices' peak, median"))
    left_out = run.facts.get("data", {}).get("left_out", {})
    # Empty documents hold nothing: where only such were left out, the record says it, not a card.
    if any(counts.keys() - {"empty"} for counts in left_out.values()):
        reasons = [
            f"{n:,} {reason}" for counts in left_out.values() for reason, n in counts.items()
        ]
        total = sum(sum(counts.values()) for counts in left_out.values())
        note = f"of {', '.join(left_out)}: {', '.join(reasons)}"
        cards.append(card("Left out of the data", f"{total:,}", note, "warn"))
    if skipped := run.skipped():
        total = sum(count for _, count in skipped)
        places = ", ".join(str(step) for step, _ in skipped[:6]) + ("…" if len(skipped) > 6 else "")
        cards.append(card("Skipped steps", str(total), f"at {places}", "warn"))
    none = "" if run.records else '<p class="soft">No records yet.</p>\n'
    return f'{none}<div class="cards">{"".join(cards)}</div>\n'


def _median(run: Run, key: str) -> float | None:
    values = run.series(key)[1]
    return float(np.median(values)) if len(values) else None


def _comparison(runs: Sequence[Run]) -> str:
    """One row per run. The lowest value of each validation set is highlighted if all runs saw
    equally many tokens: a longer run has a lower loss for that reason alone.
    """
    lengths = [run.last("tokens") or 0.0 for run in runs]
    is_fair = max(lengths) <= 1.01 * min(lengths)  # whole steps of two batch sizes differ a little
    sets = list(dict.fromkeys(name for run in runs for name in run.validation()))
    # A run whose loss is not finite cannot be the best.
    lowest = {n: np.fmin.reduce([r.validation().get(n, np.inf) for r in runs]) for n in sets}
    rows = []
    for run, ink in zip(runs, figures.colors(len(runs)), strict=True):
        row: list[str] = [Html(_named(ink, run.name))]
        for name in sets:
            bits = run.validation().get(name)
            best = ' class="best"' if is_fair and bits == lowest[name] else ""
            row.append("–" if bits is None else Html(f"<span{best}>{bits:.4f}</span>"))
        tokens = run.last("tokens")
        total = run.facts.get("parameters", {}).get("total")
        rate, seconds = _median(run, "time/tokens_per_second"), run.training_seconds()
        skipped = run.last("optim/skipped_total")
        row += ["–" if tokens is None else amount(tokens), "–" if total is None else amount(total)]
        row += [
            "–" if rate is None else amount(rate),
            "–" if seconds is None else duration(seconds),
        ]
        row += ["–" if skipped is None else f"{skipped:.0f}"]
        row += [run.facts.get("device_kind", "–")]
        rows.append(row)
    head = ["run", *(f"bits per byte, {name}" for name in sets), "tokens", "parameters"]
    return table(rows, [*head, "tokens/s", "training time", "skipped", "device"])


def _figures(runs: Sequence[Run], pictures: Sequence[figures.Picture]) -> str:
    parts = [drawing(x.svg, x.narrow, title=x.title, note=x.note) for x in pictures]
    return f'{_key(runs)}<div class="figures">{"".join(parts)}</div>' if parts else ""


def _key(runs: Sequence[Run]) -> str:
    """The colors of several runs, which stay visible while the figures are read."""
    if len(runs) == 1:
        return ""
    inks = figures.colors(len(runs))
    pairs = zip(runs, inks, strict=True)
    return f'<div class="key">{"".join(_named(ink, run.name) for run, ink in pairs)}</div>'


def _named(color: str, name: str) -> str:
    """A name after a square of its color, which stay on one line."""
    square = f'<span class="swatch" style="background:{color}"></span>'
    return f'<div class="named">{square}<span>{text(name)}</span></div>'


def _samples(run: Run, named: bool) -> str:
    """The samples of the last step that has some."""
    if not run.samples:
        return ""
    step = run.samples[-1]["step"]
    shown = [sample for sample in run.samples if sample["step"] == step][:SAMPLES_SHOWN]
    parts = []
    for sample in shown:
        label = f"{sample['kind']} · step {step}" + (f" · {run.name}" if named else "")
        words = f"<b>{text(sample['prompt'])}</b>{text(sample['text'])}"
        header = f"<header>{text(label)}</header>"
        parts.append(f'<div class="box sample">{header}<pre>{words}</pre></div>\n')
    return f'<div class="samples">{"".join(parts)}</div>\n'


def _configuration(runs: Sequence[Run], defaults: Mapping[str, Any] | None) -> str:
    """Differences first: between the runs, from the defaults, or what the command line set."""
    columns = {run.name: flatten(run.config) for run in runs if run.config}
    if not columns:
        return ""
    shown_keys, reason = set[str](), ""
    if len(runs) > 1:
        values = list(columns.values())
        shown_keys = {
            k for c in values for k in c if any(c.get(k) != other.get(k) for other in values)
        }
        reason = "Keys that differ between the runs."
    elif defaults is not None:
        base = flatten(defaults)
        columns = {"default": base, **columns}
        own = columns[runs[0].name]
        shown_keys = {key for key in base.keys() | own.keys() if base.get(key) != own.get(key)}
        reason = "Keys that differ from the defaults."
    else:
        shown_keys = {key for key in runs[0].overrides() if key in columns[runs[0].name]}
        reason = "Keys that the command line set."
    names = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(_value(c, key) for c in columns.values())] for key in names]
    head = ["key", *columns] if len(columns) > 1 else []
    some = [row for row in rows if row[0] in shown_keys]
    first = (
        f'<p class="soft small">{reason if some else "No " + reason[0].lower() + reason[1:]}</p>'
    )
    first += table(some, head, "config", shown_keys) if some else ""
    full = table(rows, head, "config", shown_keys)
    return f"{first}<details><summary>All {len(rows)} keys</summary>{full}</details>"


def _value(column: Mapping[str, Any], key: str) -> str:
    if key not in column:
        return "–"
    value = column[key]
    return value if isinstance(value, str) and value else json.dumps(value)


def _record(run: Run, named: bool) -> str:
    """The contents of run.json: layers and their forms, parameters by group, versions, devices."""
    facts = run.facts
    if not facts:
        return ""
    of = f", {run.name}" if named else ""
    layers = section(f"Layers{of}", _layers(facts["layers"])) if facts.get("layers") else ""
    parameters = ""
    if facts.get("parameters"):
        parameters = section(f"Parameters{of}", _parameters(facts["parameters"]))
    skipped_keys = ("layers", "parameters")
    # Quoted as a shell needs it, so that the command can be pasted.
    shown = facts | ({"command": shlex.join(map(str, facts["command"]))} if run.flags() else {})
    rows = [
        [key.replace("_", " "), Html(f"<code>{fact(value)}</code>")]
        for key, value in shown.items()
        if key not in skipped_keys
    ]
    body = layers + parameters + section(f"Record{of}", table(rows))
    if not named:
        return body
    return f"<details><summary>What {text(run.name)} was</summary>{body}</details>\n"


def _layers(layers: list[dict[str, Any]]) -> str:
    """Neighboring layers with equal values share a row."""
    keys = [key for key in layers[0] if key != "layer"]
    rows = []
    values_of = lambda layer: [layer.get(key) for key in keys]
    for values, group in itertools.groupby(layers, key=values_of):
        numbers = [layer["layer"] for layer in group]
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} – {numbers[-1]}"
        rows.append([span, *(Html(fact(value)) for value in values)])
    return table(rows, ["layer", *keys])


def _parameters(counts: dict[str, int]) -> str:
    total = counts["total"]
    rows = []
    for role, count in counts.items():
        share = 100 * count / max(total, 1)
        bar = (
            f'<div class="bar"><i style="width:{share:.1f}%"></i></div>' if role != "total" else ""
        )
        rows.append([role, f"{count:,}", f"{share:.1f} %", Html(bar)])
    return table(rows)


def fact(value: Any) -> str:
    """A plain value as markup: a line for each key, a dash for what is absent or empty."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, dict):
        return "<br>".join(f"{text(key)} {fact(item)}" for key, item in value.items())
    if isinstance(value, list):
        return text(" ".join(map(str, value)))
    return text(value)
