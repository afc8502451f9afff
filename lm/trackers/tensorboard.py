"""TensorBoard's event files in the run folder: tensorboard --logdir=WORKDIR."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

FOLDER = "tensorboard"
FLUSH_SECONDS = 5.0  # TensorBoard lags behind by at most this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensorboard:
    """Writes one event file per launch to workdir/tensorboard."""

    package: ClassVar[str] = "tensorboardX"

    def problem(self) -> str | None:
        return None

    def open(self, workdir: Path, config: Mapping[str, Any], first_step: int) -> _Log:
        """Opens a new event file. Raises OSError if the folder cannot be written."""
        del config
        folder = workdir / FOLDER
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        return _Log(folder / f"{name}.{os.getpid()}.{time.time_ns()}", first_step)


class _Log:
    def __init__(self, path: Path, first_step: int) -> None:
        # RecordWriter works in this thread. SummaryWriter has a thread of its own: if a full disk
        # kills that thread, whoever hands it the next event waits forever.
        self._events = RecordWriter(str(path))
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        # START hides events of this step and of later ones in files written earlier.
        self._add(step=first_step, session_log={"status": 1})

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        scalars = [{"tag": key, "simple_value": value} for key, value in values.items()]
        self._add(step=step, summary={"value": scalars})
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()

    def _add(self, **fields: Any) -> None:
        # The event class is made at import, so type checkers do not know it.
        event = vars(event_pb2)["Event"](wall_time=time.time(), **fields)
        self._events.write(event.SerializeToString())
