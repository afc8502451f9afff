"""Files that are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from lm import files


def test_replace_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.replace(path, "old")
    write_bytes = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        write_bytes(self, data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, "new text")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}
