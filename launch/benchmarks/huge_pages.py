"""Our train step on a CPU with and without the huge pages that the console command asks glibc for.

Two processes take turns, since glibc reads the variable when a process starts (espalier.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

import espalier
from launch.benchmarks import peer, problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError

MODULE = "launch.benchmarks.step_process"
GOAL = Goal("<=", 1.0)
CHOICES = {"huge pages": espalier.HUGE_PAGES, "as glibc does": "glibc.malloc.hugetlb=0"}


def check(options: Options) -> None:
    """Raises:
    UserError: not a CPU of a Linux machine.
    """
    del options
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        raise UserError(
            f"--cases=huge_pages times a CPU under Linux, this is {jax.default_backend()} under "
            f"{sys.platform}; leave it out of --cases"
        )


def run(options: Options) -> Iterator[Result]:
    for mixer in problem.MIXERS:
        yield _compare(options, mixer)


def _compare(options: Options, mixer: str) -> Result:
    sizes = options.sizes
    shape = sizes.width, sizes.num_layers, sizes.batch_size, sizes.context_length
    command = [sys.executable, "-m", MODULE, mixer, *map(str, shape)]
    env = os.environ | {"PYTHONPATH": str(Path(espalier.__file__).parent)}
    started = {
        side: peer.started(command, env | {espalier.TUNABLES: value})
        for side, value in CHOICES.items()
    }
    first, second = started.values()
    with first as one, second as other:
        ask: Callable[[peer.Process], timing.Timer] = lambda x: lambda runs: x.ask("step", runs)
        timers = dict(zip(started, map(ask, (one, other)), strict=True))
        samples = timing.take_turns(timers, options.pairs)
    a, b = started
    return timing.ratio(f"huge_pages/{mixer}", samples, (a, b), GOAL)
