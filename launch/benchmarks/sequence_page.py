"""Tables and a figure of the bytes that strategies for a split time axis send and a layer holds.

The input is the result file of `espalier bench --cases=sequence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from launch.benchmarks.markdown import missed
from launch.benchmarks.markdown import table as markdown
from lm.report.figures import INK, PALETTE, STYLE, element, svg

type Results = Sequence[Mapping[str, Any]]

SENT = ("op", "strategy", "layout", "collectives", "KB forward", "KB backward", "off by")
HELD = ("mixer", "strategy", "layout", "1 device", "2", "4", "8", "8 over 1")
STYLES = {"gather": "-", "all_to_all": "--", "ring": ":", "states": "-", "scan": ":", "halo": "-."}


def table(results: Results) -> str:
    """Two tables in Markdown: the bytes sent by op, strategy and layout; the bytes of a layer."""
    head = results[0]["facts"]
    dims = ", ".join(f"{letter} {size:,}" for letter, size in head["dims"].items())
    head_line = f"Sent by one of {head['ranks']} ranks at {dims}, float32:\n\n"
    held = next(r for r in results if r["name"].startswith("memory/"))["facts"]["layer"]
    width, time = held["model.width"], held["data.context_length"]
    between = f"\nMB of a device for one layer of width {width} and a row of {time:,} tokens:\n\n"
    return head_line + markdown(SENT, _sent(results)) + between + markdown(HELD, _held(results))


def _sent(results: Results) -> Iterator[Sequence[str]]:
    for facts, result in _of(results, "sent/"):
        found = facts["program"]
        calls = ", ".join(f"{n} {kind}" for kind, n in sorted(found["calls"].items()))
        sizes = (f"{found[way] / 1e3:,.1f}" for way in ("forward", "backward"))
        off = f"{result['value']:.2g}{missed(result)}"
        yield facts["op"], facts["strategy"], facts["layout"], calls, *sizes, off


def _held(results: Results) -> Iterator[Sequence[str]]:
    for facts, result in _of(results, "memory/"):
        sizes = (f"{x / 1e6:.1f}" for x in facts["bytes"])
        share = f"{result['value']:.3f}" + missed(result)
        yield facts["mixer"], facts["strategy"], facts["layout"], *sizes, share


def _of(results: Results, prefix: str) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    return ((r["facts"], r) for r in results if r["name"].startswith(prefix))


def figure(results: Results) -> str:
    """An SVG element: bytes sent against the length of rows, memory of a layer against ranks."""
    style: Any = {**STYLE, "svg.hashsalt": "sequence"}
    with mpl.rc_context(style):
        drawn = Figure(figsize=(9.6, 3.8), layout="constrained")
        sent, held = drawn.subplots(1, 2)
        _draw_sent(sent, results)
        _draw_held(held, results)
        return element(svg(drawn), "Sequence parallelism: bytes sent and memory held")


def _draw_sent(axes: Axes, results: Results) -> None:
    """Draws every strategy once, for the first op that has it."""
    handles: list[Line2D] = []
    shown: list[str] = []
    for facts, _ in _of(results, "sent/"):
        if facts["strategy"] in shown:
            continue
        ink: dict[str, Any] = {"color": PALETTE[len(shown)], "linestyle": STYLES[facts["strategy"]]}
        shown.append(facts["strategy"])
        axes.plot(facts["times"], [x / 1e6 for x in facts["declared_bytes"]], **ink)
        at = [x / 1e6 for x in facts["program_bytes"]]
        axes.plot(facts["times"], at, "o", color=ink["color"], markersize=3.5)
        handles.append(Line2D([], [], label=f"{facts['strategy']} ({facts['op']})", **ink))
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="MB a rank sends")
    axes.set_title("Lines: declared; dots: in the program", fontsize=9, color=INK)
    axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_held(axes: Axes, results: Results) -> None:
    handles, mixers = [], []
    for facts, _ in _of(results, "memory/"):
        mixer = facts["mixer"]
        if facts["layout"] != "contiguous" or facts["strategy"] == "all_to_all":
            continue
        mixers += [mixer] if mixer not in mixers else []
        ink: dict[str, Any] = {
            "color": PALETTE[mixers.index(mixer)],
            "linestyle": STYLES[facts["strategy"]],
        }
        share = [x / facts["bytes"][0] for x in facts["bytes"]]
        axes.plot(facts["ranks"], share, marker="o", markersize=3, **ink)
        handles.append(Line2D([], [], label=f"{mixer}, {facts['strategy']}", **ink))
    ranks = [1, 2, 4, 8]
    axes.plot(ranks, [1 / n for n in ranks], color=INK, linewidth=0.8)
    handles.append(Line2D([], [], color=INK, linewidth=0.8, label="1 / R"))
    axes.set(xscale="log", yscale="log", xlabel="ranks R", ylabel="a device's share of a layer")
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set_yticks([1 / n for n in ranks], ["1", *(f"1/{n}" for n in ranks[1:])])
    axes.minorticks_off()
    axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
