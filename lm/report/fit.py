"""The page and the tables of a fit: constants beside the published ones, tests, residuals, best
rates against tokens with other published exponents, and what was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from lm import files
from lm.fits.fit import Fitted
from lm.laws import Law
from lm.laws.power import Power
from lm.laws.step_law import StepLaw
from lm.report import figures, legends, log_axes
from lm.report.figures import INK, PALETTE, canvas
from lm.report.page import document, drawing, section, table, text

# Exponents of tokens in published best rates, drawn through the middle of our points.
EXPONENTS = (
    ("Power", Power.constant("b"), "--"),
    ("Step Law", StepLaw.constant("beta"), ":"),
    ("token horizon", Power.constant("b of the token horizon"), "-."),
)
HEAD = ("constant", "fitted", "95 % interval", "published", "range", "unit", "evidence", "source")
MOST_LINES = 8
WIDTH = 160  # columns of a table in a terminal; a narrower table breaks every cell


@dataclasses.dataclass(frozen=True)
class Found:
    """A law fitted to a table. `law` is the published one, `fitted` the same with the fitted
    constants, and `fits` has one fit per equation.
    """

    name: str
    table: str
    law: type[Law]
    fitted: Law
    fits: tuple[Fitted, ...]
    held: Mapping[str, float]


def rows(found: Found) -> list[list[str]]:
    """One line per constant of the fitted equations, under HEAD."""
    lines = []
    for one in found.fits:
        for name in one.equation.names:
            interval = one.intervals.get(name)
            lines.append(_row(found, name, one.values[name], _ends(interval)))
    return lines + [_row(found, name, value, "held") for name, value in found.held.items()]


def _row(found: Found, name: str, value: float, interval: str) -> list[str]:
    known = found.law.constant(name)
    low, high = known.low, known.high
    span = "" if low is None or high is None else f"{low:g} to {high:g}"
    own = [name, f"{value:.4g}", interval, f"{known.value:g}", span]
    return [*own, known.unit, known.tag, known.source]


def _ends(interval: tuple[float, float] | None) -> str:
    return "not asked" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def sentences(found: Found) -> list[str]:
    """Tests, warnings, remarks and domains."""
    message: list[str] = []
    for one in found.fits:
        clusters = int(one.clusters.max()) + 1
        message.append(
            f"{one.equation.target}: {len(one.selected)} rows in {clusters} clusters that share no "
            f"trunk ({one.equation.selection}), root mean square of log residuals "
            f"{np.sqrt(np.mean(one.residuals**2)):.3g}, condition number {one.condition:.3g}"
        )
        for test in one.tests:
            verdict = "is not rejected" if test.p >= 0.05 else "is rejected"
            holds = "holds" if test.is_inside else "does not hold"
            message.append(
                f"{test.name} = {test.value:g} {verdict}: Wald t = {test.statistic:.2f}, p = "
                f"{test.p:.2g}; the bootstrap interval {_ends(one.intervals[test.name])} {holds} it"
            )
        message += [f"warning: {warning}" for warning in one.warnings]
        message += found.fitted.remarks(one.selected.columns)
        message += _domain(found.law, one)
    return message


def _domain(law: type[Law], one: Fitted) -> list[str]:
    """Where the rows lie outside the range that the published law was fitted to, one line each."""
    message = []
    for name, column in one.selected.columns.items():
        if column.dtype.kind != "f":
            continue
        low, high = float(column.min()), float(column.max())
        if lines := law.outside(**{name: low}) or law.outside(**{name: high}):
            message.append(f"the rows have {name} from {low:.4g} to {high:.4g}; {lines[0]}")
    return message


def left_out(found: Found) -> list[str]:
    """The cells and rows that no equation was fitted to."""
    return list(dict.fromkeys(line for one in found.fits for line in one.selected.left_out))


def scales(found: Found) -> list[list[str]]:
    """One line per scale that was left out once."""
    return [
        [
            one.equation.target,
            left.scale,
            str(left.rows),
            f"{left.within:.3g}",
            "not determined" if np.isnan(left.without) else f"{left.without:.3g}",
        ]
        for one in found.fits
        for left in one.left_out
    ]


SCALE_HEAD = ("target", "left out", "rows", "rms with it", "rms without it")


def values(found: Found) -> dict[str, Any]:
    """The fit as plain values for JSON."""
    return {
        "law": found.name,
        "table": found.table,
        "held": dict(found.held),
        "constants": rows(found),
        "equations": [_equation(one) for one in found.fits],
        "sentences": sentences(found),
        "left_out": left_out(found),
    }


def markdown(values: Mapping[str, Any]) -> str:
    """The `values` of a fit as Markdown: constants beside the published ones, and conclusions."""
    kept = HEAD[: HEAD.index("unit")]
    lines = [f"| {' | '.join(kept)} |", "|" + "---|" * len(kept)]
    lines += [f"| {' | '.join(line[: len(kept)])} |" for line in values["constants"]]
    return "\n".join([*lines, "", *(f"- {line}" for line in values["sentences"])]) + "\n"


def _equation(one: Fitted) -> dict[str, Any]:
    scales = [dataclasses.asdict(left) for left in one.left_out]
    none = lambda value: None if isinstance(value, float) and np.isnan(value) else value
    return {
        "target": one.equation.target,
        "selection": one.equation.selection,
        "delta": one.equation.delta,
        "rows": len(one.selected),
        "clusters": int(one.clusters.max()) + 1,
        "bootstraps": len(one.samples),
        "values": one.values,
        "intervals": {name: list(ends) for name, ends in one.intervals.items()},
        "condition": one.condition,
        "tests": [dataclasses.asdict(test) for test in one.tests],
        "scales": [{key: none(value) for key, value in scale.items()} for scale in scales],
        "warnings": list(one.warnings),
    }


def show(found: Found, console: Console | None = None) -> None:
    """Prints the fit in a terminal."""
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    console.print(_terminal_table("", HEAD, rows(found)))
    for line in sentences(found):
        console.print(f"- {line}")
    if others := scales(found):
        console.print(_terminal_table("each scale left out once", SCALE_HEAD, others))
    for line in left_out(found):
        console.print(f"left out: {line}")


def _terminal_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    made = Table(*head, title=title or None, title_justify="left", header_style="bold")
    for line in lines:
        made.add_row(*line)
    return made


def write(found: Found, path: Path) -> None:
    """The fit as one offline HTML page, and its figures beside it as SVG files."""
    pictures = _pictures(found)
    files.replace(path, _page(found, pictures))
    name = lambda title: title.replace(":", "").replace(" ", "_")
    figures.save(path, {name(title): svg for title, (svg, *_) in pictures.items()})


def _page(found: Found, pictures: Mapping[str, tuple[str, ...]]) -> str:
    drawn = [drawing(*svgs, title=title) for title, svgs in pictures.items()]
    title = f"{found.name} fitted to {found.table.rsplit('/', 1)[-1]}"
    cards = table(rows(found), HEAD)
    lines = "".join(f"<li>{text(line)}</li>" for line in sentences(found))
    dropped = "".join(f"<li>{text(line)}</li>" for line in left_out(found))
    others = scales(found)
    body = [
        f"<header><h1>{text(title)}</h1></header>\n",
        section("Constants", cards),
        section("What follows", f"<ul>{lines}</ul>"),
        section("Figures", f'<div class="figures">{"".join(drawn)}</div>'),
        section("Each scale left out once", table(others, SCALE_HEAD) if others else ""),
        section("Left out", f"<ul>{dropped}</ul>" if dropped else ""),
    ]
    return document(title, "".join(body), "Espalier fit of a law")


def over_tokens(found: Found) -> str:
    """An SVG element: best rates or losses against tokens, from the first equation over tokens."""
    one = next(one for one in found.fits if one.equation.is_over_tokens)
    return _picture(f"best {one.equation.target} against tokens", _tokens, one, is_wide=True)


def _pictures(found: Found) -> dict[str, tuple[str, ...]]:
    """Title -> SVG element. One over tokens is wide, and is followed by the same for a phone."""
    drawn: dict[str, tuple[str, ...]] = {}
    for one in found.fits:
        target = one.equation.target.replace("_", " ")
        titles = {f"{target}: measured over predicted": _fit, f"{target}: residuals": _residuals}
        if one.equation.is_over_tokens:
            titles[f"best {target} against tokens"] = _tokens
        for title, draw in titles.items():
            widths = (True, False) if draw is _tokens else (False,)
            drawn[title] = tuple(_picture(title, draw, one, is_wide=x) for x in widths)
    return drawn


def _picture(
    title: str, draw: Callable[[Axes, Fitted], None], one: Fitted, *, is_wide: bool
) -> str:
    with canvas(title, is_wide) as (axes, finish):
        draw(axes, one)
        return finish()


def _groups(one: Fitted) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """The rows by size, or by batch if there is only one size: (name, mask)."""
    columns = one.selected.columns
    names = ("width", "body_parameters", "parameters", "batch_tokens")
    for name in names:
        if name in columns and 1 < len(kinds := np.unique(columns[name])) <= MOST_LINES:
            return name, [(f"{name.replace('_', ' ')} {k:g}", columns[name] == k) for k in kinds]
    return "", [("", np.ones(len(one.selected), dtype=bool))]


def _fit(axes: Axes, one: Fitted) -> None:
    measured = one.selected.columns[one.equation.target]
    predicted = measured * np.exp(-one.residuals)
    for i, (name, rows) in enumerate(_groups(one)[1]):
        axes.plot(predicted[rows], measured[rows], "o", ms=3.5, color=PALETTE[i], label=name)
    ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
    axes.plot(ends, ends, color=INK, linewidth=0.8)
    log_axes.scale(axes, "x", predicted)
    log_axes.scale(axes, "y", measured)
    axes.set(xlabel="predicted", ylabel="measured")
    _legend(axes)


def _residuals(axes: Axes, one: Fitted) -> None:
    predicted = one.selected.columns[one.equation.target] * np.exp(-one.residuals)
    for i, (name, rows) in enumerate(_groups(one)[1]):
        axes.plot(predicted[rows], one.residuals[rows], "o", ms=3.5, color=PALETTE[i], label=name)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    log_axes.scale(axes, "x", predicted)
    axes.set(xlabel="predicted", ylabel="log of measured / predicted")
    _legend(axes)


def _tokens(axes: Axes, one: Fitted) -> None:
    """Points and the fit, one color per batch (for a rate) or size (for a loss). For a rate also
    the published exponents, through the middle of the points.
    """
    columns, target = one.selected.columns, one.equation.target
    others = [name for name in one.equation.reads if name != "tokens"]
    tokens = np.geomspace(columns["tokens"].min(), columns["tokens"].max(), 50)
    by = next(iter(others), "")
    kinds = np.unique(columns[by]) if by else np.array([np.nan])
    shown = kinds[np.unique(np.linspace(0, len(kinds) - 1, MOST_LINES).round().astype(int))]
    for i, kind in enumerate(shown):
        rows = columns[by] == kind if by else np.ones(len(one.selected), dtype=bool)
        label = f"{by.replace('_', ' ')} {kind:g}" if by else "measured"
        axes.plot(
            columns["tokens"][rows], columns[target][rows], "o", ms=4, color=PALETTE[i], label=label
        )
        at = {name: np.full(50, np.median(columns[name][rows])) for name in others}
        predicted, _ = one.equation.evaluate(one.theta[None], at | {"tokens": tokens})
        axes.plot(tokens, np.exp(predicted[0]), color=PALETTE[i])
    if target == "learning_rate":
        _exponents(axes, columns, tokens)
    log_axes.scale(axes, "x", columns["tokens"])
    log_axes.scale(axes, "y", columns[target])
    axes.set(xlabel="tokens", ylabel=target.replace("_", " "))
    _legend(axes)


def _exponents(axes: Axes, columns: Mapping[str, np.ndarray], tokens: np.ndarray) -> None:
    middle = np.exp(np.mean(np.log(columns["tokens"])))
    height = np.exp(np.mean(np.log(columns["learning_rate"])))
    for name, constant, dashes in EXPONENTS:
        line = height * (tokens / middle) ** constant.value
        label = f"{name}, tokens^{constant.value:g} [{constant.tag}]"
        axes.plot(tokens, line, color=INK, linestyle=dashes, linewidth=1.0, label=label)


def _legend(axes: Axes) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    legends.below(figure, legends.named(axes))
