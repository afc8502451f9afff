from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm import readers
from lm.config import UserError
from tests.lm.readers.reading import read, write

RECORDS = [{"text": "one", "id": "a"}, {"text": "zwei\nété"}, {"text": ""}, {"text": "four"}]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "x.json", json.dumps(RECORDS, indent=indent).encode())
    assert read(path) == (
        [("a", "one"), ("x.json:2", "zwei\nété"), ("x.json:4", "four")],
        {"empty": 1},
    )


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    """C4 names its files so. A damaged line is counted, and the file is read line by line."""
    lines = [json.dumps(record) for record in RECORDS]
    path = write(tmp_path / "x.json.gz", "\n".join(["", *lines, "{"]).encode())
    found, left_out = read(path)
    assert [text for _, text in found] == ["one", "zwei\nété", "four"]
    assert left_out == {"empty": 1, "not JSON": 1}


def test_one_object_and_an_array_of_strings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ('{"text": "one"}', '\ufeff{\n "text": "one"\n}', '["one"]', '"one"'):
        assert read(write(path, content.encode()))[0] == [("x.json:1", "one")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"txt": "a"}]', "x.json: item 1 has no key 'text'"),
        (b'{\n"txt": "a"}', "x.json has no key 'text'"),
        (b'[{"text": 3}]', "is a int; it must be a string"),
        (b"[[1]]", "x.json: item 1 of data.sources.s is a list; it must be an object or a string"),
        (b"3", "is a int; it must be an object or a string"),
    ],
)
def test_mistakes(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "x.json", content))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"[1, 2", b"[" * 90_000, b'["\\ud800"]', b'["\xff"]'])
def test_damage_is_counted(tmp_path: Path, content: bytes) -> None:
    found, left_out = read(write(tmp_path / "x.json", content))
    assert (found, sum(left_out.values())) == ([], 1)


def test_an_array_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.json", b'[\n"' + b"x" * 100 + b'"]')
    monkeypatch.setattr(readers, "MOST", 99)
    with pytest.raises(UserError, match="has more than 99 bytes"):
        read(path)
