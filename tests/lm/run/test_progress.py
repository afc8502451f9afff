"""The progress line: what it says, how often, and that no kind of run makes it fail."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lm.run import progress
from lm.run.progress import LINES, GridBar, TrainingBar, WeightsBar

VALUES = {"train/loss": 2.5, "train/bpb": 3.25}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as clock[0], which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_plain_lines(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    """A line is printed at the first step and each twentieth of the run. The run has 1000 steps of
    100 tokens and half a second.
    """
    with TrainingBar(start=0, end=1000, tokens=lambda step: 100 * step) as bar:
        for step in range(1, 1001):
            clock[0] = step / 2
            bar.update(step, VALUES)
    found = lines(capsys)
    assert len(found) == LINES + 1
    assert found[0] == "step 1/1000  loss 2.500  3.250 bits/byte"
    assert found[1] == "step 50/1000  loss 2.500  3.250 bits/byte  200 tokens/s  7:55 left"
    assert found[-1].endswith("200 tokens/s  0:00 left")


def test_evaluations_are_printed_when_they_come(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """The time of an evaluation does not count as training."""
    with TrainingBar(start=0, end=40, tokens=lambda step: 100 * step) as bar:
        for step in range(1, 41):
            is_evaluated = step == 20
            clock[0] += 60.0 if is_evaluated else 0.5
            extra = {"eval/text/bpb": 1.23456, "time/mfu": 0.5} if is_evaluated else {}
            bar.update(step, VALUES | extra)
    found = lines(capsys)
    assert [line for line in found if line.startswith("step 20")] == [
        "step 20: eval/text/bpb 1.2346"
    ]
    assert all("200 tokens/s" in line for line in found[2:] if "eval" not in line)


def test_steps_that_are_reported_together_do_not_raise_the_rate(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """Every second step is reported a moment after the step before it."""
    with TrainingBar(start=0, end=100, tokens=lambda step: 100 * step) as bar:
        for step in range(1, 101):
            clock[0] = (step + step % 2) / 2 + 1e-6 * step
            bar.update(step, VALUES)
    rates = [int(re.findall(r"(\d+) tokens/s", line)[0]) for line in lines(capsys)[2:]]
    assert all(150 < rate < 250 for rate in rates[5:])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_step_and_times_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """The bar is that of a long run, with the widest numbers."""
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with TrainingBar(start=0, end=123456, tokens=lambda step: 65536 * step) as bar:
        for step in (100001, 100002, 100003):
            clock[0] += 0.5
            bar.update(step, VALUES)
        bar._bar.refresh()
    *_, line = (x for x in re.split(r"[\r\n]", written.getvalue()) if "training" in x)
    assert "100003/123456" in line
    assert "3:15:26 left" in line
    assert re.search(r" \d:\d\d:\d\d$", line.rstrip())
    assert "…" not in line
    assert ("loss 2.500" in line) == (width >= 80)
    assert ("3.250 bits/byte" in line) == (width >= 80)
    assert ("131,072 tokens/s" in line) == (width == 120)


@pytest.mark.parametrize("width", [50, 80])
def test_a_grid_shows_where_its_training_is(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with GridBar(120) as bar:
        bar.update("softmax,stickbreaking-w256-" + "x" * 60, 488, "loss 3.1")
        bar._bar.refresh()
    *_, line = (x for x in re.split(r"[\r\n]", written.getvalue()) if "trainings" in x)
    assert "0/120" in line
    assert "step 488" in line
    assert "…" not in line
    assert line.rstrip().endswith("0:00:00")


@pytest.mark.parametrize(("start", "end"), [(0, 1), (5, 5), (3, 7)])
def test_short_and_resumed_runs(
    start: int, end: int, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with TrainingBar(start=start, end=end, tokens=lambda step: 8 * step) as bar:
        for step in range(start + 1, end + 1):
            clock[0] += 1.0
            bar.update(step, VALUES | {"train/loss": float("nan")})
    found = lines(capsys)
    assert len(found) == end - start
    assert all(re.match(rf"step \d/{end}  loss nan", line) for line in found)


def test_progress_of_weights_is_printed_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with WeightsBar("reading", 10**10) as bar:
        for _ in range(10):
            clock[0] += 4.0
            bar.advance(10**9)
    assert lines(capsys) == [f"reading {done}.00/10.00 GB" for done in (3, 6, 9)]
    with WeightsBar("saving", None):
        clock[0] += 100.0
    assert lines(capsys) == []
