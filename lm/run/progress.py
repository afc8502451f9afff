"""The live line of long work: step, loss, bits per byte, tokens per second, time left of a training
run; tokens done of each task of an evaluation; weights read or written.

On a terminal a rich progress bar; elsewhere (a log file, CI) one plain line for every twentieth of
the run, for each task, or every ten seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

LINES = 20  # plain lines a run prints where there is no terminal
LINE_SECONDS = 10.0  # between the lines of reading and writing
LEAST_BAR = 6  # columns of a terminal
ELAPSED = 8  # columns of the time, which stands last


def _count() -> MofNCompleteColumn:
    """Pieces done and all of them, which a narrow terminal shows whole as well."""
    return MofNCompleteColumn(table_column=Column(no_wrap=True))


class _Bar:
    """A context manager: on a terminal `title`, a bar, `columns` and the time, while it is open."""

    def __init__(self, title: str, *columns: ProgressColumn, is_shown: bool = True) -> None:
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn(title),
            BarColumn(bar_width=None),
            *columns,
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            console=self._console,
            disable=not (is_shown and self._console.is_terminal),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def _room(self, *others: str) -> int:
        """Letters that are left for a note beside the bar, the time and what else is shown: a
        longer note would make a narrow terminal cut all of them.
        """
        taken = LEAST_BAR + ELAPSED + 1 + sum(len(other) + 1 for other in others)
        return max(0, self._console.width - taken - 1)


class TrainingBar(_Bar):
    """A context manager; `update` takes the metrics of a finished step. `tokens`: those of so many
    steps. Not `is_shown`: silent. A terminal that is too narrow for everything keeps the step, the
    times and the loss.
    """

    TITLE = "training"

    def __init__(
        self, *, start: int, end: int, tokens: Callable[[int], int], is_shown: bool = True
    ) -> None:
        self._start, self._end, self._tokens = start, end, tokens
        self._began = time.monotonic()
        self._last = (self._began, start)
        self._pace = 0.0  # seconds a token
        self._is_shown = is_shown
        columns = _count(), TextColumn("{task.fields[note]}")
        super().__init__(self.TITLE, *columns, is_shown=is_shown)
        self._task = self._bar.add_task("train", total=end, completed=start, note="compiling")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """`values` as in metrics.jsonl; evaluations are shown when they come."""
        if not self._is_shown:
            return
        now = time.monotonic()
        evaluations = [f"{k} {v:.4f}" for k, v in values.items() if k.startswith("eval/")]
        if self._last[1] > self._start and step > self._last[1] and not evaluations:
            pace = (now - self._last[0]) / (self._tokens(step) - self._tokens(self._last[1]))
            # A running mean over about twenty steps, so that one slow step does not make the
            # estimate jump; of times, since two steps that end together are told at one moment.
            self._pace = pace if not self._pace else 0.95 * self._pace + 0.05 * pace
        self._last = (now, step)
        parts = {"loss": f"loss {values['train/loss']:.3f}"}
        parts["bits"] = f"{values['train/bpb']:.3f} bits/byte"
        if self._pace:
            left = (self._tokens(self._end) - self._tokens(step)) * self._pace
            parts["rate"] = f"{1 / self._pace:,.0f} tokens/s"
            parts["left"] = f"{_minutes(left)} left"
        note = "  ".join(parts.values())
        self._bar.update(self._task, completed=step, note=self._fitting(parts))
        if evaluations:
            self._console.print(f"step {step}: {', '.join(evaluations)}", highlight=False)
        elif not self._console.is_terminal and self._crosses_line(step):
            print(f"step {step}/{self._end}  {note}", file=sys.stderr, flush=True)

    def _fitting(self, parts: Mapping[str, str]) -> str:
        """The parts of a note for which a terminal has room."""
        room = self._room(self.TITLE, f"{self._end}/{self._end}")
        shown = dict(parts)
        for least in ("rate", "bits", "loss"):
            if len("  ".join(shown.values())) <= room:
                break
            shown.pop(least, None)
        return "  ".join(shown.values())

    def _crosses_line(self, step: int) -> bool:
        span = max(1, (self._end - self._start) // LINES)
        return step == self._start + 1 or (step - self._start) % span == 0


def _minutes(seconds: float) -> str:
    """75.2 -> "1:15"; from an hour on "1:01:15"."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


class ScoringBar(_Bar):
    """A context manager over tasks; `totals` maps their labels to tokens."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        done = TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")
        super().__init__("{task.description}", done)
        self._tasks = {label: self._bar.add_task(label, total=n) for label, n in totals.items()}
        self._left = dict(totals)

    def advance(self, label: str, tokens: int) -> None:
        """`tokens` more of this task are done."""
        self._bar.advance(self._tasks[label], tokens)
        self._left[label] -= tokens
        if not self._left[label] and not self._console.is_terminal:
            print(f"scored {label}", file=sys.stderr, flush=True)


class GridBar(_Bar):
    """A context manager: trainings done of a grid, and where the present one is. Without a terminal
    a line for every training.
    """

    TITLE = "trainings"

    def __init__(self, total: int) -> None:
        super().__init__(self.TITLE, _count(), TextColumn("{task.fields[note]}"))
        self._last, self._total = "", total
        self._task = self._bar.add_task("points", total=total, note="")

    def told(self, name: str, step: int, note: str) -> None:
        """Of the training `name`; step 0: it is done, or not needed."""
        if step:
            self._last = f"{name}  step {step}  {note}"
            room = self._room(self.TITLE, f"{self._total}/{self._total}")
            where = f"  step {step}  {note}"[:room]
            self._bar.update(self._task, note=name[: max(0, room - len(where))] + where)
            return
        self._bar.advance(self._task)
        if self._last and not self._console.is_terminal:
            print(self._last, file=sys.stderr, flush=True)
        self._last = ""


class CountBar(_Bar):
    """A context manager over `total` pieces of work of one kind, `what`."""

    def __init__(self, what: str, total: int) -> None:
        super().__init__(what, _count())
        self._task = self._bar.add_task(what, total=total)

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._bar.advance(self._task, count)


class Waiting(_Bar):
    """A context manager around work whose length nobody knows: what is being done, and for how long
    already. Without a terminal a line for each piece of work.
    """

    def __init__(self, note: str) -> None:
        self._console, self._note = Console(file=sys.stderr), note
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(note, total=None)

    def __enter__(self) -> Self:
        super().__enter__()
        self.told(self._note)
        return self

    def told(self, note: str) -> None:
        """The next piece of work begins."""
        self._bar.update(self._task, description=note)
        if not self._console.is_terminal:
            print(note, file=sys.stderr, flush=True)


class WeightsBar(_Bar):
    """A context manager over `total` bytes of weights; `what` is done to them. None: they are
    not counted, and the bar only shows that work goes on.
    """

    def __init__(self, what: str, total: int | None) -> None:
        super().__init__(what, TextColumn("{task.fields[note]}"))
        self._what, self._done, self._total = what, 0, total
        self._last = time.monotonic()
        self._task = self._bar.add_task("weights", total=total, note="")

    def advance(self, size: int) -> None:
        """`size` bytes more are done."""
        self._done += size
        note = f"{self._done / 1e9:.2f}/{(self._total or 0) / 1e9:.2f} GB"
        self._bar.update(self._task, completed=self._done, note=note)
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS and not self._console.is_terminal:
            self._last = now
            print(f"{self._what} {note}", file=sys.stderr, flush=True)
