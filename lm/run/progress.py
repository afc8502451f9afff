"""Progress of long work. A training run shows step, loss, bits per byte, tokens per second and time
left; an evaluation shows tokens done per task; reading and writing weights shows bytes.

On a terminal this is a rich progress bar. Elsewhere (a log file, CI) it is plain lines: one for
every twentieth of a run, one for each task, or one every ten seconds.
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

LINES = 20  # plain lines that a run prints if there is no terminal
LINE_SECONDS = 10.0  # between plain lines while weights are read or written
LEAST_BAR = 6  # columns of the bar
ELAPSED = 8  # columns of the elapsed time, which comes last


def _count() -> MofNCompleteColumn:
    """Pieces done and their total, which a narrow terminal does not cut either."""
    return MofNCompleteColumn(table_column=Column(no_wrap=True))


class _Bar:
    """A context manager that shows `title`, a bar, `columns` and the elapsed time on a terminal."""

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
        """Columns left for a note beside the bar, the time and `others`. A longer note would make
        a narrow terminal cut all of them.
        """
        taken = LEAST_BAR + ELAPSED + 1 + sum(len(other) + 1 for other in others)
        return max(0, self._console.width - taken - 1)


class TrainingBar(_Bar):
    """A context manager for a training run; `update` takes the metrics of a finished step.
    `tokens` maps a number of steps to their tokens. Without `is_shown` it prints nothing. A narrow
    terminal keeps the step, the times and the loss.
    """

    TITLE = "training"

    def __init__(
        self, *, start: int, end: int, tokens: Callable[[int], int], is_shown: bool = True
    ) -> None:
        self._start, self._end, self._tokens = start, end, tokens
        self._began = time.monotonic()
        self._last = (self._began, start)
        self._pace = 0.0  # seconds per token
        self._is_shown = is_shown
        columns = _count(), TextColumn("{task.fields[note]}")
        super().__init__(self.TITLE, *columns, is_shown=is_shown)
        self._task = self._bar.add_task("train", total=end, completed=start, note="compiling")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """`values` as in metrics.jsonl. Evaluations are printed as they come."""
        if not self._is_shown:
            return
        now = time.monotonic()
        evaluations = [f"{k} {v:.4f}" for k, v in values.items() if k.startswith("eval/")]
        if self._last[1] > self._start and step > self._last[1] and not evaluations:
            pace = (now - self._last[0]) / (self._tokens(step) - self._tokens(self._last[1]))
            # A running mean over about twenty steps, so that one slow step does not make the
            # estimate jump. It averages times, not rates: two steps that end together are
            # reported at the same moment, and the rate of the second would be infinite.
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
        """The parts of a note that fit the terminal."""
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
    """75.2 -> "1:15"; 3675 -> "1:01:15"."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


class ScoringBar(_Bar):
    """A context manager over tasks; `totals` maps their labels to numbers of tokens."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        done = TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")
        super().__init__("{task.description}", done)
        self._tasks = {label: self._bar.add_task(label, total=n) for label, n in totals.items()}
        self._left = dict(totals)

    def advance(self, label: str, tokens: int) -> None:
        """Adds `tokens` to the work done for this task."""
        self._bar.advance(self._tasks[label], tokens)
        self._left[label] -= tokens
        if not self._left[label] and not self._console.is_terminal:
            print(f"scored {label}", file=sys.stderr, flush=True)


class GridBar(_Bar):
    """A context manager for a grid: how many trainings are done, and where the current one is.
    Without a terminal it prints one line per training.
    """

    TITLE = "trainings"

    def __init__(self, total: int) -> None:
        super().__init__(self.TITLE, _count(), TextColumn("{task.fields[note]}"))
        self._last, self._total = "", total
        self._task = self._bar.add_task("points", total=total, note="")

    def update(self, name: str, step: int, note: str) -> None:
        """Reports the training `name`. Step 0 means that it is done, or not needed."""
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
    """A context manager over `total` pieces of work; `what` names them."""

    def __init__(self, what: str, total: int) -> None:
        super().__init__(what, _count())
        self._task = self._bar.add_task(what, total=total)

    def advance(self, count: int) -> None:
        """Adds `count` to the pieces done."""
        self._bar.advance(self._task, count)


class Waiting(_Bar):
    """A context manager around work of unknown length: shows what is being done and the time it has
    taken. Without a terminal it prints one line per piece of work.
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
        self.show(self._note)
        return self

    def show(self, note: str) -> None:
        """Shows that the next piece of work, `note`, begins."""
        self._bar.update(self._task, description=note)
        if not self._console.is_terminal:
            print(note, file=sys.stderr, flush=True)


class WeightsBar(_Bar):
    """A context manager over `total` bytes of weights; `what` says what is done to them. If `total`
    is None the bar only shows that work goes on.
    """

    def __init__(self, what: str, total: int | None) -> None:
        super().__init__(what, TextColumn("{task.fields[note]}"))
        self._what, self._done, self._total = what, 0, total
        self._last = time.monotonic()
        self._task = self._bar.add_task("weights", total=total, note="")

    def advance(self, size: int) -> None:
        """Adds `size` bytes to the work done."""
        self._done += size
        note = f"{self._done / 1e9:.2f}/{(self._total or 0) / 1e9:.2f} GB"
        self._bar.update(self._task, completed=self._done, note=note)
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS and not self._console.is_terminal:
            self._last = now
            print(f"{self._what} {note}", file=sys.stderr, flush=True)
