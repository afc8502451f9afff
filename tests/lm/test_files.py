"""Files are written whole or not at all; locks; each failure gets its own message."""

import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from lm import files
from lm.config import UserError
from lm.data import prepare
from lm.parallel import watch
from lm.run import record
from lm.studies import grid


def test_replace_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.replace(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, "new text")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a file is whole or absent, even after a power failure."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(old: Any, new: Any) -> None:
        done.append(f"to {new}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = tmp_path / "a.json"
    files.replace(path, "text")
    temporary = str(tmp_path / f".a.json.{os.getpid()}.tmp")
    assert done == [temporary, f"to {path}", str(tmp_path)]

    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")

    done.clear()
    prepare._once(tmp_path / "data", write)
    partial = str(tmp_path / f".data.tmp-{os.getpid()}")
    inner = f"{partial}/inner"
    assert {inner, f"{inner}/file", partial} == set(done[:3])
    assert done[3:] == [f"to {tmp_path / 'data'}", str(tmp_path)]


@pytest.mark.parametrize("code", files.NO_LOCKS)
def test_a_file_system_without_locks(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says neither that the file is in use nor that space would help."""

    def flock(file: Any, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    takes = (
        lambda: record.locked(tmp_path / "run").__enter__(),
        lambda: grid._held(tmp_path / "cell").__enter__(),
        lambda: prepare._once(tmp_path / "data", lambda folder: None),
    )
    for take in takes:
        with pytest.raises(SystemExit) as caught, cli.mistakes_in_one_line():
            take()
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "its file system has no locks (flock); mount it with locks, or choose" in line
        assert "in use" not in line
        assert "space" not in line


def test_a_lock_that_another_holds(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as ours, open(tmp_path / "lock") as theirs:
        assert files.lock(ours)
        assert not files.lock(theirs)
    with open(tmp_path / "lock") as theirs:
        assert files.lock(theirs, is_waiting=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "choose a place that can be written"),
        (errno.EACCES, "give that permission"),
        (errno.ENAMETOOLONG, "choose a shorter path"),
        (errno.EIO, "mend that and run the same command again"),
    ],
)
def test_causes_are_told_apart(
    tmp_path: Path, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(code, os.strerror(code), str(folder))

    with pytest.raises(UserError, match=f"{re.escape(os.strerror(code))}; {message}"):
        prepare._once(tmp_path / "data", fail)
    with pytest.raises(SystemExit), cli.mistakes_in_one_line():
        fail(tmp_path)
    line = f"error: {tmp_path}: {os.strerror(code)}; {message}"
    assert capsys.readouterr().err.startswith(line)


def test_a_folder_in_the_place_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(SystemExit), cli.mistakes_in_one_line():
        files.replace(tmp_path / "a.json", "x")
    line = capsys.readouterr().err
    assert (
        line
        == f"error: {tmp_path / 'a.json'}: Is a directory; a folder is in the way: move it away\n"
    )
    (tmp_path / "a.json").rename(tmp_path / "away")
    files.replace(tmp_path / "a.json", "x")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
            "No space left on device (Error while serializing: .*; free some space and run",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing \"a/b\": no\nspace [os_error_code='28']"),
            "No space left on device (RESOURCE_EXHAUSTED: .*; free some space",
        ),
        (Exception("x [Errno 13] y"), "Permission denied (x .*; give that permission"),
        (RuntimeError("Symlink loop from 'a/b'"), "Symlink loop from 'a/b'; a link leads back"),
        (
            MemoryError("Unable to allocate 9 EiB"),
            "too little memory: Unable to allocate 9 EiB; ask",
        ),
        (MemoryError(), "too little memory: no more was given; ask for less"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"), "too little memory: RES"),
    ],
)
def test_failures_in_the_words_of_libraries(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, cli.mistakes_in_one_line():
        raise error
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert re.match("error: " + re.escape(line).replace(r"\.\*", ".*"), message)
    assert message.count("\n") == 1
    assert watch.status(error) == 2


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("os error"), ValueError("error 28")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), cli.mistakes_in_one_line():
        raise error


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: p.symlink_to(p.name), "Too many levels of symbolic links"),
        (lambda p: p.write_bytes(b'{"a": "\xe9"}'), "'utf-8' codec can't decode"),
        (lambda p: p.write_text('{"a":'), "Expecting value"),
        (lambda p: p.write_text("[" * 200_000), "maximum recursion depth"),
        (lambda p: p.write_text("[1]"), "it holds a list, not an object"),
    ],
)
def test_a_json_file_that_cannot_be_read(
    made: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    made(tmp_path / "a.json")
    with pytest.raises(UserError) as caught:
        files.read_json(tmp_path / "a.json", "restore it")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.json'} is damaged or cannot be read: {reason}")
    assert message.endswith("; restore it")


def test_a_json_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: no such file; restore it$"):
        files.read_json(tmp_path / "a.json", "restore it")
