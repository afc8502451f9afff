"""What is read from the files of a source, what is left out, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lm import readers
from lm.config import SourceConfig, UserError
from lm.data import documents, sources, splits
from lm.data.sources import LeftOut

MakeSource = Callable[..., SourceConfig]
Found = list[tuple[str, str]]


def read(source: SourceConfig) -> tuple[Found, dict[str, int]]:
    corpus, left_out, read_bytes = sources.create("s", source), LeftOut(), list[int]()
    found = list(documents.documents(corpus, left_out, read_bytes.append))
    assert sum(read_bytes) == corpus.num_bytes
    assert min(read_bytes, default=0) >= 0
    if documents.split(corpus).rule != splits.TAILS:
        return [(document.key, document.text) for document in found], left_out.counts
    whole: Found = []
    for document in found:  # the end of each follows its beginning
        is_end = document.is_valid and whole
        whole.append((document.key, (whole.pop()[1] if is_end else "") + document.text))
    return whole, left_out.counts


def test_every_kind_of_file_is_read(tmp_path: Path, make_source: MakeSource) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.md").write_text("# one\r\n")
    (tmp_path / "b.py").write_bytes("naïve = 1\n".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    lines = '{"text": "first"}\n\n{"text": "third", "id": "k"}\n{"text": "fourth", "id": 7}\n'
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    found, left_out = read(make_source(tmp_path / "**"))
    assert found == [
        ("a/one.md", "# one\r\n"),
        ("b.py", "naïve = 1\n"),
        ("c.txt.gz", "packed"),
        ("d.jsonl:1", "first"),
        ("k", "third"),
        ("7", "fourth"),
        ("e.jsonl.gz:1", "first"),
        ("k", "third"),
        ("7", "fourth"),
    ]
    assert not left_out


def test_what_is_left_out_is_counted(tmp_path: Path, make_source: MakeSource) -> None:
    contents = {
        "latin.txt": b"caf\xe9",
        "utf16.txt": "text".encode("utf-16"),
        "empty.txt": b"",
        "mark.txt": b"\xef\xbb\xbf",
        "good.txt": b"good",
        "half.jsonl": b'{"text": "\\ud800"}',
        "null.jsonl": b'{"text": null}\n{"text": ""}\n{"text": "after"}',
        "torn.jsonl": b'{"text": "a", "id": 1}\n{"text": \n{"text": "b", "id": 2}\n\xff\n',
        "deep.jsonl": b'{"text": "a", "x": ' + b"[" * 90_000 + b'\n{"text": "c"}',
        "nothing.jsonl": b"",
        "blank.jsonl": b"\n\n",
        "number.jsonl": b'{"text": "a", "x": ' + b"1" * 5000 + b"}",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found, left_out = read(make_source(tmp_path / "*"))
    assert found == [
        ("deep.jsonl:2", "c"),
        ("good.txt", "good"),
        ("null.jsonl:3", "after"),
        ("1", "a"),
        ("2", "b"),
    ]
    assert left_out == {"undecodable": 4, "empty": 6, "not JSON": 3}


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path, make_source: MakeSource) -> None:
    """This holds for every kind of file; a mark inside a text is kept."""
    mark, text = b"\xef\xbb\xbf", "one \ufeff two"
    line = json.dumps({"text": text}).encode() + b"\n"
    (tmp_path / "a.txt").write_bytes(mark + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark + text.encode()))
    (tmp_path / "c.jsonl").write_bytes(mark + line + mark + line)
    found, left_out = read(make_source(tmp_path / "*"))
    assert [body for _, body in found] == [text] * 4
    assert not left_out


def test_names_and_ids_that_are_not_unicode_are_kept(
    tmp_path: Path, make_source: MakeSource
) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "wb") as file:
        file.write(b"hello")
    lines = ['{"text": "a", "id": "\\ud800"}', '{"text": "b", "id": "\\udfff\\ud800"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    for fraction in (0.0, 0.5, 1.0):
        found, _ = read(make_source(tmp_path / "*", valid_fraction=fraction))
        assert found == [("\ud800", "a"), ("\udfff\ud800", "b"), ("caf\udce9.txt", "hello")]


def test_documents_that_share_an_id_are_split_by_content(
    tmp_path: Path, make_source: MakeSource
) -> None:
    """Documents that all have the id 0 are split too, and copies of a document are in one split."""
    lines = [json.dumps({"text": f"text {i % 40}", "id": 0}) for i in range(80)]
    lines += [json.dumps({"text": f"other {i}", "id": i}) for i in range(1, 41)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:40]))
    corpus = sources.create("s", make_source(tmp_path / "*", valid_fraction=0.3))
    sides: dict[str, set[bool]] = {}
    for document in documents.documents(corpus, LeftOut()):
        sides.setdefault(document.text, set()).add(document.is_valid)
    assert all(len(found) == 1 for found in sides.values())
    for name in ("text", "other"):
        chosen = [True in found for text, found in sides.items() if text.startswith(name)]
        assert 4 < sum(chosen) < 20
    assert sides["other 7"] == {splits.is_valid("7", 0.3)}  # one document has this id
    digest = hashlib.sha256(b"text 7").hexdigest()
    assert sides["text 7"] == {splits.is_valid(digest, 0.3)}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'["text"]\n', "x.jsonl:1 of data.sources.s is a list"),
        ("x.jsonl", b'{"txt": "a"}\n', "did you mean 'txt'"),
        ("x.jsonl", b'{"text": 3}\n', "is a int; it must be a string"),
        ("x.jsonl", b'{"text": ["a"]}\n', "is a list; it must be a string"),
        ("x.jsonl.gz", b"plain", "Not a gzipped file"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cannot read .*x.txt.gz"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:20] + b"\x07\x07", "cannot read"),
        ("x.parquet", b"", "cannot read .*x.parquet of data.sources.s: "),
        ("new\nline.txt.gz", b"", "holds nothing"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, make_source: MakeSource, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    if words == "holds nothing":
        assert read(make_source(tmp_path / "*")) == ([], {"empty": 1})
        return
    with pytest.raises(UserError, match=words) as caught:
        read(make_source(tmp_path / "*"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_document_has_a_largest_size(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file that unpacks to more is not unpacked to its end."""
    text = "x" * 5000 if "txt" in name else json.dumps({"text": "x" * 4988})
    content = text.encode()
    assert len(content) == 5000
    data = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(readers, "MOST", 5000)
    assert len(read(make_source(tmp_path / name))[0]) == 1
    monkeypatch.setattr(readers, "MOST", 4999)
    words = rf"{name}(:1)? of data.sources.s has more than 4,999 bytes, .*; divide it"
    with pytest.raises(UserError, match=words):
        read(make_source(tmp_path / name))


class Panic(BaseException):
    """Like the exceptions of libraries in Rust, it is not an Exception."""


@pytest.mark.parametrize(
    "raised", [Panic("at\nline 3"), MemoryError(), AssertionError(), OSError(5)]
)
def test_any_exception_of_a_library_is_a_user_error(
    tmp_path: Path,
    make_source: MakeSource,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    (tmp_path / "a.txt.gz").write_bytes(b"")
    monkeypatch.setattr(gzip, "GzipFile", fail)
    with pytest.raises(UserError, match=r"cannot read .*a.txt.gz of data.sources.s: \S") as caught:
        read(make_source(tmp_path / "*"))
    assert "\n" not in str(caught.value)
    for kind in (KeyboardInterrupt, SystemExit):
        raised = kind()
        with pytest.raises(kind):
            read(make_source(tmp_path / "*"))


def grown(path: Path) -> None:
    path.write_text("more of it")


def touched(path: Path) -> None:
    os.utime(path, ns=(5, 5))


@pytest.mark.parametrize("change", [grown, touched, Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, make_source: MakeSource, change: Callable[[Path], None]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    reader = documents.documents(sources.create("s", make_source(tmp_path / "*")), LeftOut())
    assert next(reader).key == "a.txt"
    change(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b.txt of data.sources.s(: No such| changed while)"):
        list(reader)


def test_pieces_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 64)
    monkeypatch.setattr(documents, "_WINDOW", 32)
    text = "Пример текста,  and words; " * 20 + "x" * 100 + "é" * 100 + "日本" * 60 + "  end"
    found = list(documents.pieces(memoryview(text.encode())))
    assert "".join(found) == text
    assert max(len(piece.encode()) for piece in found) <= 64
    between = list(itertools.pairwise(found))[:8]
    assert all(a[-1].isalnum() and b[0] == " " for a, b in between)
    assert list(documents.pieces(b"short")) == ["short"]
