"""TensorBoard's event files hold the records, one file for each launch."""

from __future__ import annotations

import gc
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from lm.trackers import tensorboard
from lm.trackers.tensorboard import FOLDER, Tensorboard

EVENT = vars(event_pb2)["Event"]  # made at import time, so type checkers do not know it


def events(workdir: Path) -> list[Any]:
    """Decodes event files: each record is length, checksum, message, checksum."""
    found = []
    for path in sorted((workdir / FOLDER).iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(EVENT.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_every_launch_has_a_file(tmp_path: Path) -> None:
    """Two launches in the same second have two. START hides later steps of earlier launches."""
    for first, steps in ((0, (1, 2)), (2, (2, 3))):
        log = Tensorboard().open(tmp_path, {}, first)
        for step in steps:
            log.write(step, {"tokens": 10 * step, "train/loss": 1.0 / step, "x": math.inf})
        log.close()
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    found = events(tmp_path)
    assert [e.step for e in found if e.HasField("session_log")] == [0, 2]
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert [step for step, tag, _ in scalars if tag == "tokens"] == [1, 2, 2, 3]
    assert (2, "train/loss", 0.5) in scalars
    assert (3, "x", math.inf) in scalars


def test_a_full_disk_does_not_leave_the_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is still closed; an open file would fail the test."""
    monkeypatch.setattr(tensorboard, "RecordWriter", lambda path: RecordWriter("/dev/full"))
    log = Tensorboard().open(tmp_path, {}, 0)
    log.write(1, {"tokens": 10})
    with pytest.raises(OSError, match="No space left"):
        log.close()
    gc.collect()
