"""The numbers of a run: metrics.jsonl, and the peak rates that MFU divides by.

metrics.jsonl holds one JSON object per line. Each is written with one call, so a killed run leaves
at most one partial line, the last:

    {"step": 20, "tokens": 81920, "train/loss": 5.25, ..., "time/tokens_per_second": 10400.0}

Everything except the entries under time/ is a function of the configuration alone. If a step
appears twice, it was evaluated when the run was resumed, and the later line counts. JSON cannot
express numbers that are not finite: they are written as null and listed under "non_finite"
({"train/loss": "nan"}), and `read` puts them back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol

from lm import files
from lm.config import UserError

FILE = "metrics.jsonl"
NON_FINITE = "non_finite"
GIVE_UP = "--accept_lost_records"  # of espalier train

log = logging.getLogger(__name__)

# Dense peak FLOP/s of one JAX device: (prefix of its device_kind, bfloat16, float32 as XLA
# multiplies it by default: TF32 on NVIDIA, one bfloat16 pass on TPU). The first match is used.
# NVIDIA: the A100, H100 and H200 Tensor Core GPU datasheets, halved where they count sparsity.
# TPU: "System architecture" pages of the Cloud TPU documentation, per chip.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("NVIDIA H200 NVL", 835.5e12, 417.7e12),
    ("NVIDIA H200", 989.4e12, 494.7e12),
    ("NVIDIA GH200", 989.4e12, 494.7e12),
    ("NVIDIA H100 NVL", 835.5e12, 417.7e12),
    ("NVIDIA H100 PCIe", 756.5e12, 378.0e12),
    ("NVIDIA H100", 989.4e12, 494.7e12),
    ("NVIDIA A100", 312.0e12, 156.0e12),
    ("TPU v4", 275.0e12, 275.0e12),
    ("TPU v5 lite", 197.0e12, 197.0e12),
    ("TPU v5e", 197.0e12, 197.0e12),
    ("TPU v5", 459.0e12, 459.0e12),
    ("TPU v6", 918.0e12, 918.0e12),
    ("TPU7x", 1153.5e12, 1153.5e12),  # half a chip
)


def peak_flops(device_kind: str, precision: str) -> float | None:
    """Peak FLOP/s of one device at a model's precision; None if unknown.

    >>> peak_flops("TPU v5 lite", "bfloat16")
    197000000000000.0
    >>> peak_flops("cpu", "float32") is None
    True
    """
    for prefix, bfloat16, float32 in _PEAKS:
        if device_kind.startswith(prefix):
            return float32 if precision == "float32" else bfloat16
    return None


class Records(NamedTuple):
    """The part of metrics.jsonl that a checkpoint counts on: its first `size` bytes and their
    SHA-256.
    """

    size: int
    sha256: str

    @staticmethod
    def of(data: bytes) -> Records:
        return Records(len(data), hashlib.sha256(data).hexdigest())


class Shown(Protocol):
    """An open tracker (lm/trackers)."""

    def write(self, step: int, values: Mapping[str, int | float]) -> None: ...
    def close(self) -> None: ...


class Writer:
    """Appends records to metrics.jsonl and shows them in a tracker; a context manager.

    Args:
      track: opens the tracker at the first step that will be written; None: no tracker.
      is_active: False writes nothing; every process but the first passes it.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        track: Callable[[int], Shown] | None = None,
        is_active: bool = True,
    ) -> None:
        self._file: BinaryIO | None = None
        self._shown: Shown | None = None
        self._size, self._sha256 = 0, hashlib.sha256()
        if not is_active:
            return
        before = read(workdir)
        first_step = before[-1]["step"] + 1 if before else 0
        try:
            self._file = open(workdir / FILE, "ab", buffering=0)  # noqa: SIM115 (_close)
            self._add((workdir / FILE).read_bytes())
            self._shown = None if track is None else track(first_step)
        except OSError as error:
            self._close()
            message = f"{error.filename}: {error.strerror}; choose a workdir to write in"
            raise UserError(message) from None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._close()
        except OSError:
            if error is None:  # otherwise the error that ended the run is the one to report
                raise

    def _close(self) -> None:
        """Closes both, even if the tracker's last records no longer fit on the disk."""
        if self._file is not None:
            self._file.close()
        if self._shown is not None:
            self._shown.close()

    def _add(self, data: bytes) -> None:
        self._size += len(data)
        self._sha256.update(data)

    def sealed(self) -> Records | None:
        """Everything written so far, for the checkpoint that counts on it. It is on the disk when
        this returns. None if this process writes nothing.
        """
        if self._file is None:
            return None
        os.fsync(self._file.fileno())
        return Records(self._size, self._sha256.hexdigest())

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record ("step", "tokens" and scalars), without waiting for the disk."""
        if self._file is None:
            return
        values = {key: _scalar(value) for key, value in record.items()}
        line = _line(values)
        if self._file.write(line) < len(line):  # a disk that is almost full writes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._add(line)
        if self._shown is not None:
            step = int(values.pop("step"))
            self._shown.write(step, values)


def validation_losses(record: Mapping[str, Any]) -> dict[str, float]:
    """Validation set -> its loss in a record, nats per token; {} if there was no evaluation."""
    pairs = ((re.fullmatch(r"eval/(.*)/loss", key), value) for key, value in record.items())
    return {match[1]: value for match, value in pairs if match}


def read(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; [] if there are none. A partial last line is skipped.

    Raises:
      UserError: a line before the last is damaged.
    """
    path = workdir / FILE
    return _records(path, _bytes(path))


def check(workdir: Path, step: int, records: Records) -> None:
    """Refuses metrics.jsonl if it does not begin with what the checkpoint of `step` counts on.

    Raises:
      UserError: those records are lost or changed.
    """
    path = workdir / FILE
    data = _bytes(path)
    if not _holds(data, records):
        raise _lost(path, data, step, records)


def cut(workdir: Path, step: int, records: Records | None, *, is_loss_accepted: bool) -> bool:
    """Drops the records after `step`, before a run continues from there. Returns whether records
    that the checkpoint of that step counts on are lost. `records` is what the checkpoint says of
    them, None if it says nothing.

    Raises:
      UserError: they are lost and that is not accepted; or a line is damaged and the checkpoint
      says nothing.
    """
    path = workdir / FILE
    data = _bytes(path)
    if records is None:
        kept, is_lost = _until(step, _records(path, data)), False
    elif _holds(data, records):
        kept, is_lost = data[: records.size], False
    elif is_loss_accepted:
        kept, is_lost = _until(step, map(_parsed, _lines(data))), True
    else:
        raise _lost(path, data, step, records)
    if kept != data:
        files.replace(path, kept)
    if is_lost:
        log.warning("%s: records of the steps up to %d are lost and given up", path, step)
    return is_lost


def _until(step: int, records: Iterable[dict[str, Any] | None]) -> bytes:
    """The lines of the records up to `step`, without damaged ones (None)."""
    return b"".join(_line(record) for record in records if record and record["step"] <= step)


def _holds(data: bytes, records: Records) -> bool:
    return Records.of(data[: records.size]) == records


def _lost(path: Path, data: bytes, step: int, records: Records) -> UserError:
    message = f"{len(data)} of {records.size} bytes are left"
    return UserError(
        f"{path} is not what the checkpoint of step {step} counts on: "
        f"{message if len(data) < records.size else 'its bytes are others'}; restore it, or give "
        f"up the records that are lost: train with {GIVE_UP}"
    )


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _records(path: Path, data: bytes) -> list[dict[str, Any]]:
    """As `read`, from the bytes of the file."""
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_lines(data), start=1):
        record = _parsed(line)
        if record is None:
            raise UserError(f"{path}:{number} is damaged; restore the file, or remove that line")
        records[record["step"]] = record
    return list(records.values())


def _lines(data: bytes) -> list[bytes]:
    """The whole lines. What follows the last newline is nothing, or a killed run's partial line."""
    return data.split(b"\n")[:-1]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A record; None if the line is not one."""
    try:
        record = json.loads(line)
        record |= {k: float(v) for k, v in record.pop(NON_FINITE, {}).items()}
    except (ValueError, TypeError, AttributeError):
        return None
    is_record = all(type(record.get(key)) is int for key in ("step", "tokens"))
    return record if is_record else None


def _scalar(value: Any) -> int | float:
    """A Python number from a Python, numpy or JAX scalar."""
    return value.item() if hasattr(value, "item") else value


def _line(record: Mapping[str, Any]) -> bytes:
    bad = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    if bad:
        record = {**record, **dict.fromkeys(bad), NON_FINITE: bad}
    return json.dumps(record, allow_nan=False).encode() + b"\n"
