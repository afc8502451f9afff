"""Text at addresses is listed, read, prepared and reused like local files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lm.config import DataConfig, SourceConfig, UserError
from lm.data import documents, sources
from lm.data.prepare import prepare
from lm.data.sources import LeftOut
from tests.lm.readers.reading import write

MakeConfig = Callable[..., DataConfig]
MakeSource = Callable[..., SourceConfig]
NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "file"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a folder in a store; each parameter is a store that holds the same files."""
    fsspec: Any = pytest.importorskip("fsspec")
    arrow: Any = pytest.importorskip("pyarrow")
    importorskip: Any = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "files"
    (folder / "b").mkdir(parents=True)
    write(folder / "a.txt", b"one")
    write(folder / "b/x.jsonl.gz", b'{"text": "two"}\n{"text": "three"}\n')
    write(folder / "b/y.json.zst", b'["four"]')
    importorskip.write_table(arrow.table({"text": ["five"]}), folder / "b/z.parquet")
    if request.param == "file":
        yield f"file://{folder}"
        return
    name = f"/bucket{next(NUMBERS)}"
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), name, recursive=True)
    yield f"memory:/{name}"
    memory.rm(name, recursive=True)


def read(source: SourceConfig) -> list[tuple[str, str]]:
    corpus = sources.create("s", source)
    return [(x.key, x.text) for x in documents.documents(corpus, LeftOut())]


def test_globs_and_single_files_are_read(root: str, make_source: MakeSource) -> None:
    whole = make_source(f"{root}/**", valid_fraction=0.0)
    assert read(whole) == [
        ("a.txt", "one"),
        ("b/x.jsonl.gz:1", "two"),
        ("b/x.jsonl.gz:2", "three"),
        ("b/y.json.zst:1", "four"),
        ("b/z.parquet:1", "five"),
    ]
    assert read(make_source(f"{root}/a.txt", valid_fraction=0.0)) == [("a.txt", "one")]
    assert [key for key, _ in read(make_source(f"{root}/b/*.json.zst", valid_fraction=0.0))] == [
        "y.json.zst:1"
    ]
    with pytest.raises(UserError, match=r"none.txt' matches no file"):
        read(make_source(f"{root}/none.txt"))


def test_a_run_prepares_addresses_once_and_reuses_them(
    root: str, tmp_path: Path, make_source: MakeSource, make_config: MakeConfig
) -> None:
    config = make_config({"text": make_source(f"{root}/**", valid_fraction=0.4)})
    folders = [
        prepare(config, tmp_path / "data", progress=False).stores["text"]["train"].folder
        for _ in range(2)
    ]
    assert folders[0] == folders[1]


def test_a_file_that_changes_while_it_is_read_is_refused(
    root: str, make_source: MakeSource
) -> None:
    fsspec: Any = pytest.importorskip("fsspec")
    corpus = sources.create("s", make_source(f"{root}/**", valid_fraction=0.0))
    reader = documents.documents(corpus, LeftOut())
    next(reader)
    with fsspec.open(f"{root}/b/x.jsonl.gz", "wb") as file:
        file.write(b"another")
    with pytest.raises(UserError, match=r"x.jsonl.gz of data.sources.s(: Not a gz| changed while)"):
        list(reader)


def test_a_missing_protocol_or_fsspec_is_a_user_error(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"nothing://x\.txt'"):
        read(make_source("nothing://x.txt"))
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    words = r"memory://x.txt is an address and fsspec is missing; .*pip install .*\[data\]"
    with pytest.raises(UserError, match=words):
        read(make_source("memory://x.txt"))
