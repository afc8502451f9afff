"""Our recurrent ops beside flash-linear-attention on a GPU: two processes that take turns.

The peer's process (peer_process.py, with torch) times a run whenever it is asked, between two of
ours, so both see the same machine. bfloat16 on both sides.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from kernels.contract import Case
from launch.benchmarks import recurrences, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Result
from lm.config import UserError

SCRIPT = Path(__file__).with_name("peer_process.py")
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("gated_linear", {"decay": "none"}),
    "scalar": ("gated_linear", {"decay": "scalar"}),
    "vector": ("gated_linear", {"decay": "vector"}),
    "delta": ("delta_rule", {"decay": "none"}),
    "gated_delta": ("delta_rule", {"decay": "scalar"}),
}
LENGTHS = (2048, 8192)
DIMS = {"B": 4, "H": 16, "K": 64, "V": 64}


def run(options: Options) -> list[Result]:
    """Raises:
    UserError: no GPU, or the peer's process does not start.
    """
    if jax.default_backend() != "gpu":
        raise UserError(
            f"--cases=peers needs an NVIDIA GPU, this is {jax.default_backend()}; "
            "leave it out of --cases"
        )
    return [_pair(peer, time, options.pairs) for peer in OURS for time in LENGTHS]


def _pair(peer: str, time: int, pairs: int) -> Result:
    op, settings = OURS[peer]
    case = Case({**DIMS, "T": time}, settings, dtype="bfloat16")
    sizes = [str(case.dims[letter]) for letter in "BTHKV"]
    with started([sys.executable, str(SCRIPT), peer, *sizes, "bfloat16"]) as ask:
        samples = turns(recurrences.side(op, case), ask, pairs)
    return timing.ratio(f"peers/T{time}/{peer}", samples, ("ours", "peer"), dims=case.dims)


def turns(ours: Any, ask: Any, pairs: int) -> timing.Samples:
    """Seconds of both, in turn; the peer times itself."""
    reported: list[float] = []
    samples = timing.interleave({"ours": ours, "peer": lambda: reported.append(ask())}, pairs)
    return samples | {"peer": reported[1:]}


@contextmanager
def started(command: list[str]) -> Iterator[Any]:
    """A function that lets the process run once and returns the seconds it took.

    Raises:
      UserError: the process ends without being ready.
    """
    # Errors go to a file: a pipe that nobody reads would stop the process when it is full.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors, text=True) as process,
    ):
        to, back = process.stdin, process.stdout
        assert to is not None
        assert back is not None
        if back.readline().strip() != "ready":
            process.wait()
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the peer's process did not start: {reason}")

        def ask() -> float:
            to.write("run\n")
            to.flush()
            return float(back.readline())

        yield ask
