"""A launch of launch.train that dies within a phase of its work, or measures how long each takes:

    python -m lm.studies.doomed PHASE COUNT SECONDS ARGUMENTS...    SIGKILL, SECONDS after PHASE
                                                                    began for the COUNT-th time
    python -m lm.studies.doomed measure 0 0 ARGUMENTS...            a line {PHASE: longest seconds}

A phase begins with a call of a function of the training program, which runs as it is.
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
    function: Callable[..., Any], told: Callable[[], None], ended: Callable[[float], None]
) -> Callable[..., Any]:
    """`function`, telling when it is called and how long that took."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        told()
        start = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            ended(time.monotonic() - start)

    return call


def main() -> None:
    phase, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    longest: dict[str, float] = {}
    for name, (owner, attribute) in PHASES.items():
        calls = itertools.count(1)

        def told(name: str = name, calls: Any = calls) -> None:
            if name == phase and next(calls) == count:
                kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
                threading.Timer(seconds, kill).start()

        def ended(took: float, name: str = name) -> None:
            longest[name] = max(took, longest.get(name, 0.0))

        setattr(owner, attribute, began(getattr(owner, attribute), told, ended))
    sys.argv[1:] = sys.argv[4:]
    try:
        runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
    finally:
        if phase == "measure":
            print(json.dumps(longest), flush=True)


if __name__ == "__main__":
    main()
