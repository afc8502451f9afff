"""What every reader does: its own endings, packing, empty files, and damage in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm import readers
from lm.config import UserError
from lm.families import READERS
from tests.lm.readers.reading import read, write, zstd

MEMBERS = dict(zip(READERS.names(), readers.every(), strict=True))


def message(path: Path) -> str:
    """The error, if a file cannot be read, or the counts, if it can."""
    try:
        found, left_out = read(path, token_dtype="uint16")
    except UserError as error:
        return str(error)
    assert all(key.startswith("x") for key, _ in found)
    return f"{len(found)} documents {left_out}"


def test_no_two_readers_share_an_ending() -> None:
    endings = [ending for reader in readers.every() for ending in reader.endings]
    assert len(set(endings)) == len(endings)
    for reader in readers.every():
        for ending in reader.endings:
            assert readers.find(f"x{ending}") is reader
            assert (readers.find(f"x{ending}.gz") is reader) == reader.packs
            assert ending in readers.known()
    assert readers.find("x.csv") is None


@pytest.mark.parametrize("name", MEMBERS)
def test_an_empty_file_is_counted(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    for ending in MEMBERS[name].endings:
        path = write(tmp_path / f"x{ending}", b"")
        has_header = f"cannot read {path} of data.sources.s: "
        said = message(path)
        assert said == "0 documents {'empty': 1}" or said.startswith(has_header)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("content", [b"\x00", b"{", b"ARROW1\0\0", b"\xff" * 2048, b"PAR1PAR1"])
def test_damage_is_one_line_or_counted(tmp_path: Path, name: str, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    for ending in MEMBERS[name].endings:
        path = write(tmp_path / f"x{ending}", content)
        said = message(path)
        assert "documents {" in said or str(path) in said
        assert "\n" not in said


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_are_read(tmp_path: Path, packing: str) -> None:
    """Files of several concatenated parts, as parallel packers write them, are read too."""
    pytest.importorskip("pyarrow")
    contents = {
        "a.txt": b"packed",
        "b.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "c.json": b'["x", "y"]',
    }
    for name, content in contents.items():
        write(tmp_path / f"{name}{packing}", content)
    wanted = ["packed", "one", "two", "x", "y"]
    assert [text for _, text in read(tmp_path / "*")[0]] == wanted
    path = tmp_path / f"d.jsonl{packing}"
    parts = [write(path, b'{"text": "%d"}\n' % i).read_bytes() for i in range(3)]
    path.write_bytes(b"".join(parts))
    assert [text for _, text in read(path)[0]] == ["0", "1", "2"]
    path.write_bytes(b"".join(parts)[:-3])
    with pytest.raises(UserError, match=r"cannot read .*d.jsonl"):
        read(path)


def test_zstd_without_pyarrow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"text"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"packed by zstd and pyarrow is missing; .* -m pip install -c "
    ):
        read(tmp_path / "a.txt.zst")
