"""Without a tracker, nothing but metrics.jsonl is written."""

from __future__ import annotations

from pathlib import Path

from lm.trackers.off import Off


def test_nothing_is_written(tmp_path: Path) -> None:
    log = Off().open(tmp_path, {}, 0)
    log.write(1, {"tokens": 10})
    log.close()
    assert list(tmp_path.iterdir()) == []
