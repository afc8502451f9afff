"""Interleaved timing, and what a case reports.

Sides are run in turn, A B, B A, A B, ..., so that a slow minute of the machine hits all of them.
A side's time is its lower quartile: what disturbs a run only ever makes it longer. Everything is
compiled and run once before the first sample.

A kernel of a GPU can take less than its host to start it. A `Timer` runs a side many times, one
run queued behind the other, and waits once: `take_turns` asks for as many as make a sample.
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
Timer = Callable[[int], float]  # runs -> the seconds that so many take together
SAMPLE = 5e-3  # seconds: what a host takes to start a run is some 1 % of it


class Goal(NamedTuple):
    """What `Result.value` should be."""

    relation: Literal["<", "<=", ">="]
    bound: float

    def is_met(self, value: float) -> bool:
        compare = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}[self.relation]
        return bool(compare(value, self.bound))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One number: `value` from lower quartiles (or counted), `by_medians` the same from medians.

    `samples`: seconds of every run of every side, in order. `facts`: what else belongs to it. Where
    nothing could be measured `value` is NaN (null in a file, JSON has no NaN), `refused` among the
    facts says why, side by side, and there is no goal.
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
    """Seconds of `pairs` runs of every side; a side returns when its work is done."""
    samples: Samples = {name: [] for name in sides}
    for function in sides.values():
        function()
    for name in _turns(list(sides), pairs):
        start = time.perf_counter()
        sides[name]()
        samples[name].append(time.perf_counter() - start)
    return samples


def take_turns(timers: Mapping[str, Timer], pairs: int) -> Samples:
    """Seconds of one run, `pairs` samples of every side; all samples are of equally many runs."""
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
    """Compiled for `args`; results stay on the device."""
    return queueing(jax.jit(function).lower(*args).compile(), args)


def queueing(compiled: Callable[..., Any], args: Any) -> Timer:
    """Of a compiled function, run on `args`."""

    def run(runs: int) -> float:
        start, out = time.perf_counter(), None
        for _ in range(runs):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


def call(function: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """A side: compiled for `args` and waited for; results stay on the device."""
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
    """What could not be measured; `facts` hold the reasons of every side, `refused`."""
    return Result(name=f"{name}/refused", value=math.nan, facts=facts)


def ratio(
    name: str, samples: Samples, over: tuple[str, str], goal: Goal | None = None, **facts: Any
) -> Result:
    """Time of one side over that of another."""
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
    """A line for each result, and below it the times of its sides, or why it was refused."""
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
