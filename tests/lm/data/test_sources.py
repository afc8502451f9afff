"""Which files belong to a source, and which of its documents are held out."""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import SourceConfig, UserError
from lm.data import sources
from lm.data.sources import Corpus

MakeSource = Callable[..., SourceConfig]


def names(corpus: Corpus) -> list[str]:
    return [file.name for file in corpus.files]


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
    assert names(sources.create("s", make_source("~/*.txt"))) == ["a.txt"]


def test_a_name_in_brackets_is_itself(tmp_path: Path, make_source: MakeSource) -> None:
    """This holds for a folder, a file, and both inside a pattern. "[v1]" as a pattern is v or 1."""
    for name in ("x[v1]/a.txt", "x[v1]/b[0].txt", "xv/other.txt", "c[12].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    cases = {
        "x[v1]/a.txt": ["a.txt"],
        "x[v1]/*.txt": ["a.txt", "b[0].txt"],
        "x[v1]/b[0].txt": ["b[0].txt"],
        "*/b[0].txt": ["x[v1]/b[0].txt"],
        "c[34].txt": [],
        "c[12].txt": ["c[12].txt"],
        "x[v]/*.txt": ["xv/other.txt"],
        "x[[]v1]/a*": ["x[v1]/a.txt"],
    }
    for path, wanted in cases.items():
        if wanted:
            assert names(sources.create("s", make_source(tmp_path / path))) == wanted
            continue
        with pytest.raises(UserError, match=r"matches no file; .* \[ \] are a pattern, \[\[\] is"):
            sources.create("s", make_source(tmp_path / path))


def test_a_file_counts_once_however_many_links_lead_to_it(
    tmp_path: Path, make_source: MakeSource
) -> None:
    """Naively followed, a link to a parent folder yields each file 41 times, and two yield it 2^40
    times; some of the copies would be held out.
    """
    (tmp_path / "a/b").mkdir(parents=True)
    for link in ("a/b/up", "a/b/top", "a/again"):
        (tmp_path / link).symlink_to(tmp_path / "a")
    (tmp_path / "a/0").symlink_to(tmp_path / "a/b")
    (tmp_path / "a/0.txt").symlink_to(tmp_path / "a/z.txt")
    (tmp_path / "a/gone.txt").symlink_to(tmp_path / "nothing.txt")
    (tmp_path / "a/self.txt").symlink_to(tmp_path / "a/self.txt")
    os.mkfifo(tmp_path / "a/pipe.txt")
    for name in ("a/z.txt", "a/b/y.txt", "outside.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "a/m.txt").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "a/n.txt").symlink_to(tmp_path / "outside.txt")
    corpus = sources.create("s", make_source(tmp_path / "a/**/*.txt"))
    assert names(corpus) == ["b/y.txt", "m.txt", "z.txt"]
    left_out = corpus.left_out
    assert left_out.counts == {
        "duplicate folder": 4,
        "duplicate file": 2,
        "broken link": 2,
        "special file": 1,
    }
    assert left_out.first["special file"].endswith("pipe.txt")
    link = make_source(tmp_path / "a/gone.txt")
    with pytest.raises(UserError, match=r"matches no file but 1 broken link \(first .*gone.txt\)"):
        sources.create("s", link)


def test_a_broken_link_in_place_of_a_folder_is_counted(
    tmp_path: Path, make_source: MakeSource
) -> None:
    """Otherwise an absent disk would remove its files from training silently."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1/a.txt").write_text("a")
    for name in ("2", "3"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for path in ("*/*.txt", "**/*.txt", "[12]/a.txt", "**"):
        corpus = sources.create("s", make_source(tmp_path / path))
        assert len(corpus.files) == 1
        assert corpus.left_out.counts == {"broken link": 1 if path[0] == "[" else 2}, path
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    corpus = sources.create("s", make_source(tmp_path / "**/*.txt"))
    assert corpus.left_out.counts == {"broken link": 3}


def test_the_shortest_of_several_links_names_a_folder(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for every order in which the folder lists them."""
    for folder in ("out", "a/b"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out/x.txt").write_text("x")
    for link in ("a/d", "a/c", "a/b/a"):
        (tmp_path / link).symlink_to(tmp_path / "out")
    listed = os.listdir
    for is_reversed in (False, True):
        order = lambda folder, r=is_reversed: sorted(listed(folder), reverse=r)
        monkeypatch.setattr(os, "listdir", order)
        corpus = sources.create("s", make_source(tmp_path / "a/**/*.txt"))
        assert names(corpus) == ["c/x.txt"]
        assert corpus.left_out.counts == {"duplicate folder": 2}


def test_globs_name_what_pythons_own_do(tmp_path: Path, make_source: MakeSource) -> None:
    for name in ("a.txt", "b/a.txt", "b/.h/a.txt", "b/c/ab.txt", ".h.txt", "b/c/d/a.txt", "e/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    patterns = (
        "*.txt",
        "**/*.txt",
        "**",
        "b/**",
        "*/*.txt",
        "b/**/?.txt",
        "**/c/**/*.txt",
        ".*.txt",
    )
    for pattern in (*patterns, "**/**/a*", "*/c/*", "b/.h/*", "b/../*.txt", "[ab]*", "**/[!b].txt"):
        wanted = {
            x for x in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(x).is_file()
        }
        found = sources.create("s", make_source(tmp_path / pattern)).files
        assert {str(file.path) for file in found} == {str(Path(x)) for x in wanted}, pattern
        assert len(wanted) > 0


def test_a_folder_that_cannot_be_read_is_a_user_error(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("a")
    listed = os.listdir

    def listdir(folder: Path) -> list[str]:
        if Path(folder).name == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UserError, match=r"cannot read the folder .*/b: Permission denied"):
        sources.create("s", make_source(tmp_path / "**/*.txt"))


def test_bad_paths_are_refused(tmp_path: Path, make_source: MakeSource) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    cases = {
        "nothing*.txt": "matches no file",
        "": "is a folder; set a glob such as",
        "*.csv": "none of .arrow .bin .feather .json",
        "long" * 2000 + ".txt": "matches no file",
        "long" * 2000 + "/*.txt": "matches no file",
        "a\0b.txt": "matches no file",
        "a\nb*.txt": "matches no file",
        "\udce9.txt": "matches no file",
    }
    with pytest.raises(UserError, match="path='' matches no file"):
        sources.create("s", make_source(""))
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            sources.create("s", make_source(f"{tmp_path}/{path}" if path else tmp_path))
        assert "\n" not in str(caught.value)


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
