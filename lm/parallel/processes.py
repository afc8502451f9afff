"""Several processes that train as one: how they meet, and what they agree on.

    choose -> joined: (initialize, watch) -> the run -> (all arrive, shutdown)

Every process runs the same program in the same order. Values that are not arrays go through the
key-value service of JAX's process 0: it needs no device, and waits as long as necessary.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.config import UserError, difference
from lm.mapping import MISTAKE
from lm.parallel import watch
from lm.parallel.watch import Watch, count, index

START_SECONDS = 300.0  # all processes of a run must have started within this time
JAX_SILENCE_SECONDS = 100.0  # default after which JAX considers a silent process lost
WAIT_SECONDS = 7 * 24 * 3600.0  # how long to wait for others: the first may prepare data for hours

_ROOT = "espalier"
# One counter per function, because all processes call one function in the same order.
_calls: dict[str, Iterator[int]] = {name: itertools.count() for name in ("wait", "agree", "gather")}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where processes meet. `coordinator` is process 0's HOST:PORT; "" asks a TPU pod or Slurm."""

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = 0


def choose(
    processes: str, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Start | None:
    """What the four flags of the same names mean; None is a single process.

    Raises:
      UserError: the flags contradict each other, or one is missing.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        if len(missing) < len(given):
            raise UserError(
                f"--{missing[0]} is missing: --coordinator, --num_processes and --process_id go "
                "together; set all three or none"
            )
        return Start() if processes == "auto" else None
    if processes == "auto":
        raise UserError(
            f"--processes=auto and --coordinator={coordinator} exclude each other; drop one"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, process 0's address")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} with --num_processes={num_processes}; number the "
            f"processes from 0 to {num_processes - 1}"
        )
    return Start(coordinator, num_processes, process_id)


def is_first() -> bool:
    """Whether this process writes what is written only once."""
    return index() == 0


@contextlib.contextmanager
def joined(start: Start | None, silence_seconds: float) -> Iterator[None]:
    """Runs the body as one of several processes, or alone if `start` is None. It must be entered
    before any device is touched.

    Raises:
      UserError: the processes cannot meet.
    """
    if start is None:
        yield
        return
    _initialize(start, silence_seconds)
    watch.have_last_word()
    running = Watch(silence_seconds)
    running.start()
    try:
        yield
        wait()
    except BaseException as error:
        running.report(error)
        atexit.register(watch.depart, watch.status(error))
        raise
    running.stop()
    jax.distributed.shutdown()


def wait() -> None:
    """Returns when every process has called it."""
    if count() > 1:
        watch.client().wait_at_barrier(_next("wait"), int(1000 * WAIT_SECONDS))


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the body, and then the others do. No collective may be inside."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def agree(value: Any) -> Any:
    """The first process's value, which JSON must be able to hold; the first does not wait."""
    if count() == 1:
        return value
    key = _next("agree")
    if is_first():
        watch.client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(watch.client().blocking_key_value_get(key, int(1000 * WAIT_SECONDS)))


def gather(value: str) -> list[str]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    folder = _next("gather")
    watch.client().key_value_set(f"{folder}/{index()}", value)
    timeout = int(1000 * WAIT_SECONDS)
    return [watch.client().blocking_key_value_get(f"{folder}/{i}", timeout) for i in range(count())]


def check_equal(what: str, value: Mapping[str, Any]) -> None:
    """Checks that all processes were given the same.

    Raises:
      UserError: this process was given something else than the first; names the first difference.
    """
    ours_all = json.loads(json.dumps(value))  # tuples become lists, as in the agreed value
    for key, (theirs, ours) in difference(agree(ours_all), ours_all).items():
        raise UserError(
            f"process {index()} has {what} {key}={ours!r}, process 0 {theirs!r}; "
            "start all of them with the same command"
        )


def to_host(tree: Any) -> Any:
    """The tree with numpy arrays, each whole in every process."""

    def whole(x: jax.Array) -> np.ndarray:
        if count() == 1 or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) request a stop. The yielded function then
    returns True, in all processes at the same call. In a single process a second signal has its
    usual effect. An ignored SIGHUP stays ignored (nohup).
    """
    # With several processes JAX itself handles SIGTERM: it notifies the others and finds the first
    # call that none has made yet. Without a signal that costs no communication.
    taken = [signal.SIGINT] + [signal.SIGTERM] * (count() == 1)
    taken += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
    before = {s: signal.getsignal(s) for s in taken}
    requested: list[int] = []
    calls = itertools.count()

    def handle(signum: int, frame: Any) -> None:
        signal.signal(signum, before[signal.Signals(signum)])
        if count() == 1:
            requested.append(signum)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop() -> bool:
        if count() == 1 or requested:
            return bool(requested)
        if multihost_utils.reached_preemption_sync_point(next(calls)):
            requested.append(signal.SIGTERM)
        return bool(requested)

    for signum in taken:
        signal.signal(signum, handle)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _next(function: str) -> str:
    return f"{_ROOT}/{function}/{next(_calls[function])}"


def _initialize(start: Start, silence_seconds: float) -> None:
    where = f"--coordinator={start.coordinator}" if start.coordinator else "--processes=auto"

    def give_up() -> None:
        # JAX itself would try longer, and then abort with a stack trace.
        watch.end(
            MISTAKE,
            f"{where}: not all processes started within {START_SECONDS:g} s; start all of them",
        )

    timer = threading.Timer(START_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    # JAX's own heartbeats come later than ours; see lm/parallel/watch.py.
    options: dict[str, Any] = {
        "initialization_timeout": int(2 * START_SECONDS),
        "heartbeat_timeout_seconds": int(max(JAX_SILENCE_SECONDS, 2 * silence_seconds)),
    }
    if start.coordinator:
        options |= dataclasses.asdict(start) | {"coordinator_address": start.coordinator}
        # Ignore what a surrounding cluster says about its devices.
        options |= {"cluster_detection_method": "deactivate"}
        del options["coordinator"]
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if not start.coordinator:
            # JAX then complains about an argument of its own, which is not a flag of ours.
            why = "" if "coordinator_address" in reason else f" ({reason})"
            reason = f"no TPU pod and no Slurm job found{why}; "
            reason += "set --coordinator, --num_processes, --process_id"
        raise UserError(f"{where}: {reason}") from None
    finally:
        timer.cancel()
