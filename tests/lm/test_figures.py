"""What every figure and table of a page keeps to: nothing covers or hides another thing."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lm.report import figures, legends, log_axes, page
from lm.report.folder import Run


def run(*records: dict[str, Any]) -> Run:
    """One with these records, numbered."""
    numbered = [{"step": i, "tokens": 100 * i, **record} for i, record in enumerate(records, 1)]
    return Run("run", Path(), {}, {}, numbered, [])


def drawn(title: str, shown: Run) -> str:
    return next(picture.svg for picture in figures.draw([shown]) if picture.title == title)


def test_equal_curves_are_all_visible() -> None:
    """Learning rates of groups are often equal; the last one does not hide the others."""
    rates = [{"lr/a": 1.0 / i, "lr/b": 1.0 / i, "lr/c": 2.0 / i} for i in range(1, 41)]
    assert drawn("Learning rate", run(*rates)).count("stroke-dasharray") == 1


def test_the_caption_of_learning_rates_explains_the_groups_and_the_largest_rate() -> None:
    records = [{"lr/hidden": 0.008 / i, "lr/input": 0.004 / i} for i in range(1, 5)]
    shown = run(*records)
    note = lambda shown: next(x.note for x in figures.draw(shown) if x.title == "Learning rate")
    groups = "per parameter group; hidden: matrices between activations; input: embeddings"
    assert note([shown]) == f"{groups}; largest rate so far: 0.008"
    reached, below = (
        dataclasses.replace(shown, config={"schedule": {"peak_learning_rate": peak}})
        for peak in (0.008, 0.02)
    )
    assert note([reached]) == note([shown])
    assert note([below]) == f"{note([shown])}, below schedule.peak_learning_rate=0.02"
    assert note([shown, below]) == groups


def test_what_is_lost_of_each_curve_has_its_own_bar() -> None:
    records = [{"train/loss": 1.0, "eval/stdlib/loss": 2.0}] * 40
    lost = [dict.fromkeys(records[0], math.nan)] * 40
    bar = r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n"[^>]*stroke-width: 4'
    heights = re.findall(bar, drawn("Loss", run(*records, *lost)))
    assert len(heights) == len(set(heights)) == 2


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize(
    "ends", [(1.7, 2.1), (0.04, 0.055), (5e-3, 6e-2), (2.6e5, 4.2e6), (3.0, 200.0), (1e-5, 7.0)]
)
def test_labels_of_a_logarithmic_axis_do_not_touch(
    ends: tuple[float, float], is_wide: bool
) -> None:
    with figures.canvas("title", is_wide) as (axes, finish):
        axes.plot(ends, ends)
        log_axes.scale(axes, "x", ends)
        log_axes.scale(axes, "y", log_axes.heights(axes))
        finish.figure.draw_without_rendering()
        for axis, edge in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            labels = [x for x in axis.get_ticklabels() if x.get_text()]
            low, high = axis.get_view_interval()
            boxes = [
                label.get_window_extent()
                for label, place in zip(labels, axis.get_ticklocs(), strict=True)
                if low <= place <= high
            ]
            assert len(boxes) >= 2
            assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))
            for before, after in itertools.pairwise(boxes):
                assert getattr(before, f"{edge}1") < getattr(after, f"{edge}0")


@pytest.mark.parametrize("count", [2, 8, 9, 20])
def test_every_run_has_its_color(count: int) -> None:
    assert len(set(figures.colors(count))) == count


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize("letters", [3, 20, 200])
def test_a_legend_covers_nothing(letters: int, is_wide: bool) -> None:
    """It lies below the axes and within the figure, and the axes keep their height."""
    heights = []
    for count in (0, 11):
        with figures.canvas("title", is_wide) as (axes, finish):
            axes.plot([0, 1], [0, 1])
            axes.set_xlabel("tokens")
            labels = [f"{i}" * letters for i in range(count)]
            legends.below(finish.figure, dict(zip(labels, [axes.lines[0]] * count, strict=True)))
            finish.figure.draw_without_rendering()
            heights.append(axes.get_window_extent().height)
            for legend in finish.figure.legends:
                box, whole = legend.get_window_extent(), finish.figure.bbox
                panel = axes.get_tightbbox()
                assert panel is not None
                assert box.y1 < panel.y0
                assert whole.x0 <= box.x0
                assert box.x1 <= whole.x1
                assert whole.y0 <= box.y0
    assert heights[1] == pytest.approx(heights[0], rel=0.12)


def test_a_phone_shows_a_narrow_drawing_of_a_wide_figure() -> None:
    both = page.drawing("<svg>wide</svg>", "<svg>tall</svg>", title="a < b")
    assert '<div class="broad"><svg>wide' in both
    assert '<div class="narrow"><svg>tall' in both
    assert "a &lt; b" in both
    assert "narrow" not in page.drawing("<svg>one</svg>")


def test_a_long_name_in_a_head_may_break() -> None:
    """Eight runs fit the page side by side."""
    assert "<th>a_<wbr>b</th>" in page.table([["key", 1, 2]], ["", "a_b", "c"])


@pytest.mark.parametrize("absent", [None, "", [], {}])
def test_what_is_absent_is_a_dash(absent: object) -> None:
    assert page.fact({"sent": absent, "n": 0}) == "sent –<br>n 0"
