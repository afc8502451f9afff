from __future__ import annotations

import collections
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import SourceConfig, UserError
from lm.data import sources
from lm.data.sources import Corpus, Document

MakeSource = Callable[..., SourceConfig]


def read(corpus: Corpus) -> tuple[list[Document], dict[str, int]]:
    skipped: collections.Counter[str] = collections.Counter()
    read_bytes: list[int] = []
    found = list(sources.documents(corpus, skipped, read_bytes.append))
    assert sum(read_bytes) == corpus.num_bytes
    assert min(read_bytes) >= 0
    return found, dict(skipped)


def test_kinds_of_files(tmp_path: Path, make_source: MakeSource) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.md").write_text("# one\r\n")
    (tmp_path / "b.py").write_bytes("naïve = 1\n".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    lines = '{"text": "first"}\n\n{"text": "third", "id": "k"}\n{"text": "fourth", "id": 7}\n'
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    found, skipped = read(sources.create("s", make_source(tmp_path / "**")))
    assert found == [
        Document("a/one.md", "# one\r\n"),
        Document("b.py", "naïve = 1\n"),
        Document("c.txt.gz", "packed"),
        Document("d.jsonl:1", "first"),
        Document("k", "third"),
        Document("7", "fourth"),
        Document("e.jsonl.gz:1", "first"),
        Document("k", "third"),
        Document("7", "fourth"),
    ]
    assert not skipped


def test_parquet(tmp_path: Path, make_source: MakeSource) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"body": ["one", None, "três"], "n": [1, 2, 3]}), path)
    found, skipped = read(sources.create("s", make_source(path, text_key="body")))
    assert found == [Document("t.parquet:1", "one"), Document("t.parquet:3", "três")]
    assert skipped == {"empty": 1}
    for key, words in {"bdoy": "did you mean 'body'", "n": "must hold strings"}.items():
        with pytest.raises(UserError, match=words):
            read(sources.create("s", make_source(path, text_key=key)))
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="not readable Parquet"):
        read(sources.create("s", make_source(path)))


def test_parquet_without_pyarrow(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'espalier\[data\]'"):
        read(sources.create("s", make_source(tmp_path / "t.parquet")))


def test_skipped_are_counted(tmp_path: Path, make_source: MakeSource) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_bytes(b"good")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}')
    found, skipped = read(sources.create("s", make_source(tmp_path / "*")))
    assert [document.key for document in found] == ["good.txt"]
    assert skipped == {"undecodable": 2, "empty": 1}


def test_stdlib(make_source: MakeSource) -> None:
    corpus = sources.create("s", make_source("stdlib"))
    names = [file.name for file in corpus.files]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert "ast.py" in names
    assert "json/decoder.py" in names
    assert corpus.num_bytes > 5e6
    excluded = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(excluded & set(Path(name).parts) for name in names)
    assert all(name.endswith(".py") for name in names)


def test_home_is_expanded(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(sources.create("s", make_source("~/*.txt")))[0] == [Document("a.txt", "a")]


def test_split_is_stable_and_near_its_fraction() -> None:
    keys = [f"{i}.py" for i in range(4000)]
    valid = {key for key in keys if sources.is_valid(key, 0.1)}
    assert abs(len(valid) / 4000 - 0.1) < 0.015
    assert valid < {key for key in keys if sources.is_valid(key, 0.2)}  # growing keeps the old ones
    assert not any(sources.is_valid(key, 0.0) for key in keys)
    assert all(sources.is_valid(key, 1.0) for key in keys)
    # As fractions, sha256 of these keys is 0.1865, 0.2690 and 0.8785.
    fractions = {
        key: next(f / 100 for f in range(101) if sources.is_valid(key, f / 100)) for key in keys[:3]
    }
    assert fractions == {"0.py": 0.19, "1.py": 0.27, "2.py": 0.88}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl:2 of data.sources.s is not JSON"),
        ("x.jsonl", b'["text"]\n', "x.jsonl:1 of data.sources.s is a list"),
        ("x.jsonl", b'{"txt": "a"}\n', "did you mean 'txt'"),
        ("x.jsonl", b'{"text": 3}\n', "is a int; it must be a string"),
        ("x.jsonl", b'{"text": "\xff"}\n', "not JSON"),
        ("x.jsonl.gz", b"plain", "Not a gzipped file"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cannot read .*x.txt.gz"),
        ("x.csv", b"a,b", "none of .txt .md .py"),
    ],
)
def test_bad_files(
    tmp_path: Path, make_source: MakeSource, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(sources.create("s", make_source(tmp_path / "*")))
    assert "\n" not in str(caught.value)


def test_bad_paths(tmp_path: Path, make_source: MakeSource) -> None:
    with pytest.raises(UserError, match="matches no file"):
        sources.create("s", make_source(tmp_path / "nothing*.txt"))
    with pytest.raises(UserError, match="is a folder; set a glob such as"):
        sources.create("s", make_source(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    corpus = sources.create("s", make_source(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="No such file"):
        list(sources.documents(corpus, collections.Counter()))


def test_description_follows_content(tmp_path: Path, make_source: MakeSource) -> None:
    (tmp_path / "a.txt").write_text("a")

    def description(**changes: object) -> str:
        return json.dumps(sources.create("s", make_source(tmp_path / "*", **changes)).description)

    first = description()
    assert description() == first
    assert description(weight=0.0) == first
    assert description(valid_fraction=0.1) != first
    assert description(text_key="body") != first
    (tmp_path / "a.txt").write_text("ab")
    second = description()
    assert second != first
    (tmp_path / "b.txt").write_text("b")
    assert description() != second
