"""metrics.jsonl survives kills, resumes and non-finite numbers. A tracker gets the same records."""

from __future__ import annotations

import doctest
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm import metrics
from lm.config import UserError


def write(workdir: Path, steps: range) -> None:
    with metrics.Writer(workdir) as writer:
        for step in steps:
            writer.write({"step": step, "tokens": 10 * step, "train/loss": 1.0 / step})


class Seen:
    """A tracker that keeps the records it is given."""

    def __init__(self, error: type[OSError] | None = None) -> None:
        self.first: list[int] = []
        self.shown: list[tuple[int, dict[str, Any]]] = []
        self.is_open, self._error = False, error

    def __call__(self, first_step: int) -> Seen:
        self.first.append(first_step)
        self.is_open = True
        return self

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.shown.append((step, dict(values)))

    def close(self) -> None:
        self.is_open = False
        if self._error is not None:
            raise self._error("No space left")


def test_doctests() -> None:
    assert doctest.testmod(metrics).failed == 0


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert metrics.read(tmp_path) == [
        {"step": step, "tokens": 10 * step, "train/loss": 1.0 / step} for step in (1, 2, 3)
    ]


def test_a_tracker_is_shown_the_same_records(tmp_path: Path) -> None:
    """Including non-finite numbers. When a run resumes, the tracker gets the step that it resumes
    from.
    """
    seen = Seen()
    for steps in ((1, 2), (3,)):
        with metrics.Writer(tmp_path, track=seen) as writer:
            for step in steps:
                writer.write({"step": step, "tokens": 10 * step, "train/loss": np.float32("inf")})
            assert seen.is_open
        assert not seen.is_open
    assert seen.first == [0, 3]
    assert [{"step": step} | values for step, values in seen.shown] == metrics.read(tmp_path)


def test_each_record_is_on_disk_before_the_writer_closes(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write({"step": 1, "tokens": 10})
        assert metrics.read(tmp_path) == [{"step": 1, "tokens": 10}]


def test_numpy_scalars_become_numbers(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write({"step": np.int64(1), "tokens": 10, "train/loss": np.float32(0.5)})
    assert metrics.read(tmp_path) == [{"step": 1, "tokens": 10, "train/loss": 0.5}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path, value: float) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write({"step": 1, "tokens": 10, "train/loss": value, "train/nll": 2.0})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=refuse)
    assert line["train/loss"] is None
    assert list(line["non_finite"]) == ["train/loss"]
    (record,) = metrics.read(tmp_path)
    np.testing.assert_equal(record["train/loss"], value)
    assert "non_finite" not in record


def test_a_partial_last_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / metrics.FILE
    path.write_bytes(path.read_bytes()[:-7])
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / metrics.FILE
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"st'))
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        metrics.read(tmp_path)


def test_resume_leaves_what_an_uninterrupted_run_would(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    write(whole, range(1, 9))
    write(resumed, range(1, 7))
    path = resumed / metrics.FILE
    path.write_bytes(path.read_bytes()[:-5])  # killed while writing step 6
    metrics.cut(resumed, 4, None, is_loss_accepted=False)
    write(resumed, range(5, 9))
    assert path.read_bytes() == (whole / metrics.FILE).read_bytes()
    assert {p.name for p in resumed.iterdir()} == {metrics.FILE}


def test_cut_keeps_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write({"step": step, "tokens": step, "train/loss": math.inf})
    metrics.cut(tmp_path, 1, None, is_loss_accepted=False)
    assert metrics.read(tmp_path) == [{"step": 1, "tokens": 1, "train/loss": math.inf}]


def test_cut_without_a_file_or_need_changes_nothing(tmp_path: Path) -> None:
    metrics.cut(tmp_path, 5, None, is_loss_accepted=False)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, range(1, 3))
    before = (tmp_path / metrics.FILE).stat().st_mtime_ns
    metrics.cut(tmp_path, 2, None, is_loss_accepted=False)
    assert (tmp_path / metrics.FILE).stat().st_mtime_ns == before


LOSSES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "without its last line": lambda data: data[: data.rindex(b"{")],
    "without a line": lambda data: data[data.index(b"\n") + 1 :],
    "a flipped digit": lambda data: data.replace(b'"tokens": 3', b'"tokens": 7', 1),
    "a line without values": lambda data: b"{}\n" + data[data.index(b"\n") + 1 :],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_lost_records_that_a_checkpoint_counts_on_are_noticed(
    tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The resume is refused in one line. If the user accepts the loss, it is logged, and the
    records that remain are whole.
    """
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "tokens": step})
        records = writer.sealed()
        writer.write({"step": 4, "tokens": 4})
    assert records is not None
    path = tmp_path / metrics.FILE
    whole = path.read_bytes()
    assert not metrics.cut(tmp_path, 3, records, is_loss_accepted=False)
    assert [x["step"] for x in metrics.read(tmp_path)] == [1, 2, 3]
    lost = LOSSES[loss](whole[: records.size])
    path.unlink() if lost is None else path.write_bytes(lost)
    with pytest.raises(UserError, match="is not what the checkpoint of step 3 counts on") as caught:
        metrics.cut(tmp_path, 3, records, is_loss_accepted=False)
    assert "\n" not in str(caught.value)
    assert metrics.cut(tmp_path, 3, records, is_loss_accepted=True)
    assert caplog.messages == [f"{path}: records of the steps up to 3 are lost and given up"]
    assert len(metrics.read(tmp_path)) <= 3


@pytest.mark.parametrize("line", [b"{}", b"[]", b"3", b"\xff", b'{"step": "1", "tokens": 1}', b"{"])
def test_a_line_that_is_not_a_record(tmp_path: Path, line: bytes) -> None:
    """Once the line is removed, as the message says, the other lines can be read."""
    write(tmp_path, range(1, 3))
    path = tmp_path / metrics.FILE
    whole = path.read_bytes()
    path.write_bytes(line + b"\n" + whole)
    with pytest.raises(UserError, match=f"{metrics.FILE}:1 is damaged; .*, or remove that line"):
        metrics.read(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert [x["step"] for x in metrics.read(tmp_path)] == [1, 2]


def test_the_later_of_two_records_of_a_step_counts(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        for values in ({"a": 1}, {"a": 1, "eval/x": 2}):
            writer.write({"step": 1, "tokens": 1} | values)
    assert metrics.read(tmp_path) == [{"step": 1, "tokens": 1, "a": 1, "eval/x": 2}]


def test_an_inactive_writer_leaves_no_trace(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path / "absent", is_active=False) as writer:
        writer.write({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="workdir"):
        metrics.Writer(tmp_path / "file")


@pytest.mark.parametrize(
    ("kind", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16_operands", 312e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "float32", 918e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
    ],
)
def test_peaks(kind: str, precision: str, peak: float | None) -> None:
    assert metrics.peak_flops(kind, precision) == peak


def test_a_disk_that_fills_within_a_line_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write({"step": 1, "tokens": 10})
        monkeypatch.setattr(writer, "_file", Half(writer._file))
        with pytest.raises(OSError, match="No space left"):
            writer.write({"step": 2, "tokens": 20})
    assert metrics.read(tmp_path) == [{"step": 1, "tokens": 10}]


class Half:
    """A file that writes only the first half of what it is given."""

    def __init__(self, file: Any) -> None:
        self.name, self.close, self._file = file.name, file.close, file

    def write(self, data: bytes) -> int:
        return self._file.write(data[: len(data) // 2])


def test_a_tracker_that_cannot_close(tmp_path: Path) -> None:
    """Its error is raised, unless another error ended the run; then that one is."""
    seen = Seen(OSError)
    with pytest.raises(OSError, match="No space left"), metrics.Writer(tmp_path, track=seen):
        pass
    with pytest.raises(UserError, match="first"), metrics.Writer(tmp_path, track=seen):
        raise UserError("first")
