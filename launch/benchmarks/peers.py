"""Our kernels against those of other projects on a GPU, in two processes that take turns.

    espalier bench --cases=kernels,peers --pairs=10 --precision=bfloat16 --out=FILE

The peer's process (peer_process.py, with torch) times its kernel between two samples of ours, so
that both see the machine in the same state. Both sides run in bfloat16, forward alone and with the
backward pass; our side is the kernel for this device. Peers are flash-linear-attention
(`pip install flash-linear-attention`) and the stick-breaking authors' kernel. The latter is not on
PyPI: put a checkout of github.com/shawntan/stickbreaking-attention on PYTHONPATH. Its goal holds
for shy keys, where ours does not stop early (`forms`).

A peer's arrays have 32,768 tokens: 128 MiB each at 16 heads of 128, so that it needs a few GB. JAX
reserves three quarters of a GPU when it starts. That leaves 20 GB of 80, which is enough. If memory
runs out, the row says so; XLA_PYTHON_CLIENT_MEM_FRACTION=.5 leaves more to the peer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from launch.benchmarks import ceilings, forms, timing
from launch.benchmarks.ceilings import Ceilings
from launch.benchmarks.forms import Sizes, Timed
from launch.benchmarks.peer import PeerError, Process, started
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError

SCRIPT = Path(__file__).with_name("peer_process.py")
FLA, AUTHORS = Goal("<=", 1.0), Goal("<=", 0.8)


class Ours(NamedTuple):
    """Our op and its options to compare with a peer; `goal` bounds our time over the peer's."""

    op: str
    options: dict[str, Any]
    goal: Goal


OURS = {
    "linear": Ours("gated_linear", {"decay": "none"}, FLA),
    "scalar": Ours("gated_linear", {"decay": "scalar"}, FLA),
    "vector": Ours("gated_linear", {"decay": "vector"}, FLA),
    "delta": Ours("delta_rule", {"decay": "none"}, FLA),
    "gated_delta": Ours("delta_rule", {"decay": "scalar"}, FLA),
    "stickbreaking": Ours("stickbreaking", {}, AUTHORS),
}


def check(options: Options) -> None:
    """Raises:
    UserError: JAX finds no GPU.
    """
    del options
    if jax.default_backend() != "gpu":
        raise UserError(
            f"--cases=peers needs an NVIDIA GPU, but JAX's backend is {jax.default_backend()}; "
            "leave it out of --cases"
        )


def run(options: Options, sizes: Sizes = forms.SIZES) -> Iterator[Result]:
    """Raises:
    UserError: as `check`, or no peer runs.
    """
    check(options)
    yield from compare(sizes, options.pairs, options.peer_python or sys.executable)


def compare(sizes: Sizes, pairs: int, python: str) -> Iterator[Result]:
    """The ceilings, and a row for each peer, size and pass. `python` runs the peers.

    Raises:
      UserError: no peer runs.
    """
    limits = ceilings.measure(sizes, pairs)
    yield from limits.results("peers")
    reasons: dict[str, None] = {}
    has_run = False
    for peer, ours in OURS.items():
        for problem in forms.timed([(ours.op, ours.options)], sizes):
            for row in _beside(python, peer, problem, pairs, limits):
                refused = row.facts["refused"].get("peer")
                has_run |= refused is None
                reasons |= {refused: None} if refused else {}
                yield row
    if not has_run:
        raise UserError(f"--cases=peers: no peer runs: {' | '.join(reasons)}")


def _beside(
    python: str, peer: str, problem: Timed, pairs: int, limits: Ceilings
) -> Iterator[Result]:
    dims, dtype = problem.case.dims, problem.case.dtype
    kernel = forms.chosen(problem.op, problem.case)
    goal = None if problem.keys == forms.RANDOM else OURS[peer].goal
    arguments = [peer, *(str(dims[letter]) for letter in "BTHKV"), dtype, problem.keys]
    with started([python, str(SCRIPT), *arguments]) as process:
        for which in forms.PASSES:
            facts: dict[str, Any] = {"dims": dict(dims), "dtype": dtype, "form": kernel.form}
            facts["refused"] = dict(kernel.refused)
            name = f"peers/{problem.title}/{which}/over {peer}"
            try:
                facts["peer"] = process.describe()
                samples = _turns(process, problem, kernel.form, which, pairs)
            except PeerError as error:
                facts["refused"]["peer"] = str(error)
                yield timing.refused(name, **facts)
            except forms.REFUSALS as error:
                facts["refused"]["ours"] = forms.reason(error)
                yield timing.refused(name, **facts)
            else:
                facts["of_ceilings"] = {
                    side: limits.fractions(problem.op, problem.case, which, taken)
                    for side, taken in samples.items()
                }
                yield timing.ratio(name, samples, ("ours", "peer"), goal, **facts)


def _turns(process: Process, problem: Timed, form: str, which: str, pairs: int) -> timing.Samples:
    """Raises:
    PeerError: the peer cannot run this. One of forms.REFUSALS: we cannot.
    """
    process.ask(which, 1)  # before anything of ours is compiled
    ours = forms.timer(problem, form, which, forms.drawn(problem))
    timers = {"ours": ours, "peer": lambda runs: process.ask(which, runs)}
    return timing.take_turns(timers, pairs)
