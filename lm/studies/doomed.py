"""A launch of launch.train that dies within a phase of its work, or measures how long phases take:

    python -m lm.studies.doomed PHASE COUNT SECONDS ARGUMENTS...    SIGKILL, SECONDS after PHASE
                                                                    began for the COUNT-th time
    python -m lm.studies.doomed measure 0 0 ARGUMENTS...            a line {PHASE: least seconds}

A phase is a call of a function of the training program, which itself runs unchanged. The last words
on stderr say where the kill happened: "in PHASE" or, between two calls, "after PHASE".
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lm import report
from lm.data import prepare
from lm.data.loader import Loader
from lm.evaluation import evaluate
from lm.run.saver import Checkpointer

PHASES: dict[str, tuple[Any, str]] = {
    "preparation": (prepare, "prepare"),
    "training": (Loader, "__next__"),
    "evaluation": (evaluate, "run"),
    "save": (Checkpointer, "save"),
    "report": (report, "write"),
}


def began(
    function: Callable[..., Any], called: Callable[[], None], ended: Callable[[float], None]
) -> Callable[..., Any]:
    """`function`, which also reports when it is called and how long the call took."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        called()
        start = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            ended(time.monotonic() - start)

    return call


def main() -> None:
    phase, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    least: dict[str, float] = {}
    place = "before everything"

    def kill() -> None:
        sys.stderr.write(f"\n{place}")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    for name, (owner, attribute) in PHASES.items():
        calls = itertools.count(1)

        def called(name: str = name, calls: Any = calls) -> None:
            nonlocal place
            place = f"in {name}"
            if name == phase and next(calls) == count:
                threading.Timer(seconds, kill).start()

        def ended(took: float, name: str = name) -> None:
            nonlocal place
            place = f"after {name}"
            least[name] = min(took, least.get(name, took))

        setattr(owner, attribute, began(getattr(owner, attribute), called, ended))
    sys.argv[1:] = sys.argv[4:]
    try:
        runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
    finally:
        if phase == "measure":
            print(json.dumps(least), flush=True)


if __name__ == "__main__":
    main()
