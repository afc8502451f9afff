"""The numbers of a run: metrics.jsonl, and the peak rates that MFU divides by.

One JSON object a line, each written with one call, so that a killed run leaves at most one partial
line, the last:

    {"step": 20, "tokens": 81920, "train/loss": 5.25, ..., "time/tokens_per_second": 10400.0}

Everything but the entries under time/ is a function of the configuration alone. A step that stands
there twice was evaluated when it was resumed: the later line counts. JSON has no word
for a number that is not finite: it is written as null and named in "non_finite" ({"train/loss":
"nan"}); `read` puts it back.
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

# Dense peak FLOP/s of one JAX device: (first words of its device_kind, bfloat16, float32 as XLA
# multiplies it by default: TF32 on NVIDIA, one bfloat16 pass on TPU). The first match counts.
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
    """Peak FLOP/s of one device under a precision policy of the model; None if not known.

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
    """What a checkpoint knows of metrics.jsonl: its first `size` bytes, and their SHA-256."""

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
    """Appends records to metrics.jsonl, and shows them in a tracker; a context manager.

    Args:
      track: opens the tracker at the first step that will be written; None: there is none.
      is_active: False writes nothing at all, for every process but the first.
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
            self._file = open(workdir / FILE, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)
            self._add((workdir / FILE).read_bytes())
            self._shown = None if track is None else track(first_step)
        except OSError as error:
            self._close()
            told = f"{error.filename}: {error.strerror}; choose a workdir to write in"
            raise UserError(told) from None

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
            if error is None:  # what ended the run is told, not what that led to
                raise

    def _close(self) -> None:
        """Both are closed, also where the tracker's last records no longer fit on the disk."""
        if self._file is not None:
            self._file.close()
        if self._shown is not None:
            self._shown.close()

    def _add(self, data: bytes) -> None:
        self._size += len(data)
        self._sha256.update(data)

    def sealed(self) -> Records | None:
        """All that was written, which is on the disk on return, for the checkpoint that counts on
        it; None where nothing is written.
        """
        if self._file is None:
            return None
        os.fsync(self._file.fileno())
        return Records(self._size, self._sha256.hexdigest())

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record: "step", "tokens" and scalars. It is on its way to disk on return."""
        if self._file is None:
            return
        values = {key: _scalar(value) for key, value in record.items()}
        line = _line(values)
        if self._file.write(line) < len(line):  # what a disk does that is about to be full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._add(line)
        if self._shown is not None:
            step = int(values.pop("step"))
            self._shown.write(step, values)


def validation_losses(record: Mapping[str, Any]) -> dict[str, float]:
    """validation set -> its loss in a record, nats a token; {} of a step that was not evaluated."""
    pairs = ((re.fullmatch(r"eval/(.*)/loss", key), value) for key, value in record.items())
    return {match[1]: value for match, value in pairs if match}


def read(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; [] before the first. A partial last line is left out.

    Raises:
      UserError: a line before the last is damaged.
    """
    path = workdir / FILE
    return _records(path, _bytes(path))


def check(workdir: Path, step: int, records: Records) -> None:
    """Refuses records that are not those which the checkpoint of `step` counts on.

    Raises:
      UserError: they are lost, or others.
    """
    path = workdir / FILE
    data = _bytes(path)
    if not _holds(data, records):
        raise _lost(path, data, step, records)


def cut(workdir: Path, step: int, records: Records | None, *, is_loss_accepted: bool) -> bool:
    """Drops what was recorded after `step`, before a run goes on from there; whether records that
    the checkpoint of that step counts on (`records`; None: it does not say) are lost.

    Raises:
      UserError: they are, and that is not accepted; or, where the checkpoint does not say, a line
      is damaged.
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
    """The lines of the records up to `step`, without those that are damaged (None)."""
    return b"".join(_line(record) for record in records if record and record["step"] <= step)


def _holds(data: bytes, records: Records) -> bool:
    return Records.of(data[: records.size]) == records


def _lost(path: Path, data: bytes, step: int, records: Records) -> UserError:
    told = f"{len(data)} of {records.size} bytes are left"
    return UserError(
        f"{path} is not what the checkpoint of step {step} counts on: "
        f"{told if len(data) < records.size else 'its bytes are others'}; restore it, or give up "
        f"the records that are lost: train with {GIVE_UP}"
    )


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _records(path: Path, data: bytes) -> list[dict[str, Any]]:
    """As `read`, of the bytes of the file."""
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_lines(data), start=1):
        record = _parsed(line)
        if record is None:
            raise UserError(f"{path}:{number} is damaged; restore the file, or remove that line")
        records[record["step"]] = record
    return list(records.values())


def _lines(data: bytes) -> list[bytes]:
    """Whole ones: after the last of them there is nothing, or the partial line of a killed run."""
    return data.split(b"\n")[:-1]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A record; None of a line that is not one."""
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
