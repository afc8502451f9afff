"""The part of a comparison's page that says which is better: verdicts, speed-ups, differences."""

from __future__ import annotations

from lm.report.compared import Comparison
from lm.report.page import table, text

NO_PRIMARY = "The study names no primary comparison, and has no verdict."
SPEED_UP = "how many times the cost {} has for the same loss"
WIDE = 10.0  # an interval of a factor that reaches further than this from the mean says nothing
DIFFERENCES = "no verdict, for they were not named beforehand"


def cards(found: Comparison) -> str:
    """One card per verdict."""
    marks = {"better": "first", "worse": "warn", "diverged": "warn"}
    lines = [
        f'<div class="card {marks.get(v.outcome, "")}"><div class="note">{text(v.sentence)}</div>'
        "</div>\n"
        for v in found.verdicts
    ]
    return f'<div class="verdicts">{"".join(lines)}</div>' if lines else text(NO_PRIMARY)


def speed_up(found: Comparison) -> str:
    """The table of `speed_ups` with its title; "" if there is none."""
    body, head = speed_ups(found)
    note = text(SPEED_UP.format(found.rows[0].pattern))
    return f'<p class="soft small">{note}</p>{table(body, head)}' if body else ""


def speed_ups(found: Comparison) -> tuple[list[list[str]], list[str]]:
    """One row per pattern: mean over seeds and its interval. A factor is "undetermined" if its
    interval reaches below a tenth of the mean and above ten times the mean.
    """

    def cell(mean: float, low: float | None, high: float | None) -> str:
        if low is not None and high is not None and low < mean / WIDE and high > mean * WIDE:
            return "undetermined"
        return f"{mean:.2f} ({low:.2f} to {high:.2f})" if low is not None else f"{mean:.2f}"

    body = [[x.pattern, cell(*x.tokens), cell(*x.flops), cell(*x.seconds)] for x in found.speed_ups]
    return body, ["pattern", "in tokens", "in FLOPs", "in seconds"]


def differences(found: Comparison) -> str:
    """The differences without a verdict, folded away."""
    body, head = difference_table(found)
    shown = table(body, head)
    return f"<details><summary>{text(DIFFERENCES)}</summary>{shown}</details>\n" if body else ""


def difference_table(found: Comparison) -> tuple[list[list[str]], list[str]]:
    """One row per difference; a single row for a task where every pattern is at chance."""

    def between(low: float | None, high: float | None) -> str:
        return f"{low:+.3g} to {high:+.3g}" if low is not None else "-"

    body = []
    for task in dict.fromkeys(x.task for x in found.differences):
        own = [x for x in found.differences if x.task == task]
        if all(x.outcome == "at chance" for x in own):
            body.append([task, "every pattern", "", "at chance", "", ""])
            continue
        for x in own:
            value = "-" if x.difference is None else f"{x.difference:+.4g} {x.unit}"
            note = f" ({x.outcome})" if x.outcome else ""
            intervals = between(x.seeds_low, x.seeds_high), between(x.low, x.high)
            body.append([task, x.pattern, x.against, value + note, *intervals])
    head = ["task", "pattern", "minus", "difference", "95 % over seeds", "95 % over units"]
    return body, head


def of_bits(found: Comparison, pattern: str) -> str:
    """What the verdicts say about a pattern's bits per byte; the lowest mean alone proves
    nothing. "" if they say nothing.
    """
    words = {"better": "better than", "worse": "worse than", "same": "not clearly different from"}
    message = [
        f"{words[v.outcome]} {v.against if v.pattern == pattern else v.pattern}"
        for v in found.verdicts
        if v.task.startswith("bits_per_byte") and v.outcome in words
        if v.pattern == pattern or (v.against == pattern and v.outcome == "same")
    ]
    return ", ".join(message)
