from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lm.config import UserError
from tests.lm.readers.reading import read


def parquet(path: Path, columns: dict[str, object]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(
        arrow.table(list(columns.values()), [name.strip() for name in columns]), path
    )
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"body": ["one", None, "três"], "n": [1, 2, 3]})
    found, left_out = read(path, text_key="body")
    assert found == [("t.parquet:1", "one"), ("t.parquet:3", "três")]
    assert left_out == {"empty": 1}
    for key, words in {"bdoy": "did you mean 'body'", "n": "must hold strings"}.items():
        with pytest.raises(UserError, match=words):
            read(path, text_key=key)
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match=r"cannot read .*t.parquet of data.sources.s: "):
        read(path)


def test_parquet_rows_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    """The columns have 32-bit or 64-bit offsets, good rows among the bad, and ids."""
    arrow = pytest.importorskip("pyarrow")
    for kind in (arrow.string(), arrow.large_string()):
        binary = arrow.binary() if kind == arrow.string() else arrow.large_binary()
        rows = [b"good", b"caf\xe9", None, b"", b"\xed\xa0\x80", "été".encode()]
        column = arrow.array(rows, binary).view(kind)
        path = parquet(tmp_path / "t.parquet", {"text": column, "id": arrow.array(range(6))})
        found, left_out = read(path)
        assert found == [("0", "good"), ("5", "été")]
        assert left_out == {"undecodable": 2, "empty": 2}


def test_parquet_has_strings_in_several_forms(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    texts = arrow.array(["a", "b", None, "a"])
    for column in (texts.dictionary_encode(), texts.cast(arrow.string_view())):
        path = parquet(tmp_path / "t.parquet", {"text": column, "id": column})
        found, left_out = read(path)
        assert found == [("a", "a"), ("b", "b"), ("a", "a")]
        assert left_out == {"empty": 1}
    path = parquet(tmp_path / "t.parquet", {"text": arrow.nulls(3)})
    assert read(path) == ([], {"empty": 3})


def test_parquet_ids_may_be_strings_or_integers(tmp_path: Path) -> None:
    """Strings and integers are ids. A row whose id is null or has no Python value keeps
    its text.
    """
    arrow = pytest.importorskip("pyarrow")
    kinds = {
        ("7", "8"): arrow.array([7, 8], arrow.uint64()),
        ("a", "b\udcff"): arrow.array([b"a", b"b\xff"]).view(arrow.string()),
        ("a", "t.parquet:2"): arrow.array(["a", None]),
        ("t.parquet:1", "t.parquet:2"): arrow.array([10**18 + 1] * 2, arrow.timestamp("ns")),
    }
    for wanted, ids in kinds.items():
        path = parquet(tmp_path / "t.parquet", {"text": ["x", "y"], "id": ids})
        for fraction in (0.0, 0.5):
            found, left_out = read(path, valid_fraction=fraction)
            assert tuple(key for key, _ in found) == wanted
            assert left_out == {}


@pytest.mark.parametrize("name", ["text", "id"])
def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path, name: str) -> None:
    path = parquet(tmp_path / "t.parquet", {"text": ["a"], "id": ["b"], name + " ": ["c"]})
    with pytest.raises(UserError, match=f"has 2 columns of the name '{name}'; rename all but one"):
        read(path)


def test_parquet_without_pyarrow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r" -m pip install -c .*\[data\]'"):
        read(tmp_path / "t.parquet")
