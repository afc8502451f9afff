"""Interleaved timing, and the results that a case reports.

Sides run in turn, A B, B A, A B, ..., so that a slow minute of the machine affects all of them. A
side's time is the lower quartile of its samples, since disturbances only ever make a run longer.
Everything is compiled and run once before the first sample.

A GPU can run a kernel in less time than its host takes to start it. A `Timer` therefore queues many
runs of a side and waits once; `take_turns` chooses how many runs make a sample long enough.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.table import Table

Samples = dict[str, list[float]]
Timer = Callable[[int], float]  # number of runs -> seconds of all of them
SAMPLE = 5e-3  # seconds; starting a run takes the host about 1 % of this


class Goal(NamedTuple):
    """The bound that `Result.value` should satisfy."""

    relation: Literal["<", "<=", ">="]
    bound: float

    def is_met(self, value: float) -> bool:
        compare = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}[self.relation]
        return bool(compare(value, self.bound))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One number: `value` comes from lower quartiles (or is counted), `by_medians` from medians.

    `samples`: seconds of every run of every side, in order. `facts`: anything else to record. If
    nothing could be measured, `value` is NaN (null in a file, since JSON lacks NaN), `goal` is None
    and `facts["refused"]` gives the reason of each side.
    """

    name: str
    value: float
    by_medians: float | None = None
    goal: Goal | None = None
    samples: Samples = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        goal = None
        if self.goal is not None:
            goal = self.goal._asdict() | {"met": self.goal.is_met(self.value)}
        return dataclasses.asdict(self) | {
            "value": None if math.isnan(self.value) else self.value,
            "goal": goal,
            "lower_quartiles": {side: quartile(x) for side, x in self.samples.items()},
            "medians": {side: float(np.median(x)) for side, x in self.samples.items()},
        }


def quartile(samples: list[float]) -> float:
    return float(np.quantile(samples, 0.25))


def interleave(sides: Mapping[str, Callable[[], object]], pairs: int) -> Samples:
    """The seconds of `pairs` runs of every side; a side returns when its work is done."""
    samples: Samples = {name: [] for name in sides}
    for function in sides.values():
        function()
    for name in _turns(list(sides), pairs):
        start = time.perf_counter()
        sides[name]()
        samples[name].append(time.perf_counter() - start)
    return samples


def take_turns(timers: Mapping[str, Timer], pairs: int) -> Samples:
    """The seconds of one run, in `pairs` samples of every side. Every sample averages the same
    number of runs.
    """
    for timer in timers.values():
        timer(1)
    runs = math.ceil(SAMPLE / min(timer(1) for timer in timers.values()))
    samples: Samples = {name: [] for name in timers}
    for name in _turns(list(timers), pairs):
        samples[name].append(timers[name](runs) / runs)
    return samples


def _turns(names: list[str], pairs: int) -> Iterator[str]:
    for i in range(pairs):
        yield from names[:: 1 if i % 2 == 0 else -1]


def timer(function: Callable[..., Any], *args: Any) -> Timer:
    """A timer of `function`, compiled for `args`; results stay on the device."""
    return queueing(jax.jit(function).lower(*args).compile(), args)


def queueing(compiled: Callable[..., Any], args: Any) -> Timer:
    """A timer of a compiled function, run on `args`."""

    def run(runs: int) -> float:
        start, out = time.perf_counter(), None
        for _ in range(runs):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


def call(function: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """A side: `function` compiled for `args`; it returns when the results are on the device."""
    return waiting(jax.jit(function).lower(*args).compile(), args)


def waiting(compiled: Callable[..., Any], args: Any) -> Callable[[], object]:
    """A side: a compiled function run on `args`."""
    return lambda: jax.block_until_ready(compiled(*args))


def thread(compiled: Callable[..., Any], state: Any, *rest: Any) -> Callable[[], object]:
    """A side: `state, out = compiled(state, *rest)`, each run on the state of the one before."""
    held = [state]

    def run() -> None:
        held[0], out = compiled(held[0], *rest)
        jax.block_until_ready((held, out))

    return run


def refused(name: str, **facts: Any) -> Result:
    """A result that could not be measured; `facts` hold each side's reason under `refused`."""
    return Result(name=f"{name}/refused", value=math.nan, facts=facts)


def ratio(
    name: str, samples: Samples, over: tuple[str, str], goal: Goal | None = None, **facts: Any
) -> Result:
    """The time of one side over that of another."""
    first, second = (samples[side] for side in over)
    return Result(
        name=name,
        value=quartile(first) / quartile(second),
        by_medians=float(np.median(first) / np.median(second)),
        goal=goal,
        samples={side: samples[side] for side in over},
        facts=facts,
    )


def table(results: list[Result]) -> Table:
    """A line for each result, followed by the times of its sides or the reasons of a refusal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("result", "value", "by medians", "goal", "met"):
        is_name = column == "result"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=not is_name)
    for result in results:
        goal, met = "", ""
        if result.goal is not None:
            goal = f"{result.goal.relation} {result.goal.bound:g}"
            met = "yes" if result.goal.is_met(result.value) else "no"
        medians = "" if result.by_medians is None else f"{result.by_medians:.3f}"
        value = f"{result.value:.3f}" if result.value >= 1e-3 else f"{result.value:.1e}"
        if math.isnan(result.value):
            value = "refused"
        table.add_row(result.name, value, medians, goal, met)
        if math.isnan(result.value):
            for side, reason in result.facts["refused"].items():
                table.add_row(f"  {side}: {reason}", "", "", "", "", style="dim")
        for side, samples in result.samples.items():
            table.add_row(
                f"  {side}, ms", f"{quartile(samples) * 1e3:.4g}", "", "", "", style="dim"
            )
    return table
