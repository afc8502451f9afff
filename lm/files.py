"""Atomic writes, file locks, and one-line messages for failures that say what to do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lm.mapping import UserError

# Error codes of flock: another process holds the lock; the file system has no locks.
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
MARK = ".made_by"  # a file in every folder of results
# How libraries write an error code into text: safetensors and other Rust code, tensorstore.
CODES = re.compile(r"(?:\(os error |\bos_error_code='|\[Errno |\bOS error )(\d+)")
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory"  # how XLA's message begins
_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "give that permission, or choose another place",
    errno.EPERM: "give that permission, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "restore it, or name another",
    errno.EISDIR: "a folder is in the way: move it away",
    errno.ENOTDIR: "a file is in the way: move it away",
    errno.EEXIST: "move away what is in the way, or choose another name",
    errno.ELOOP: "a link leads back to itself: remove it",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOLCK: "mount it with locks, or choose a folder of another file system",
}


def replace(path: Path, content: str | bytes) -> None:
    """Writes a whole file or leaves the old one, even if the process or the machine is killed.

    Raises:
      OSError: the file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A file name that is not UTF-8 arrives with lone surrogates, which are written escaped.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except IsADirectoryError:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_line(what: str, advice: str = "") -> Iterator[None]:
    """Wraps calls of a library that reads a user's file: whatever it raises becomes one line,
    "WHAT: the reason; ADVICE". There is no list of exception types, because readers of formats
    raise what they please, and those written in Rust panic with exceptions that are not an
    Exception.

    Raises:
      UserError: the library raised something, or the block itself raised a UserError.

    >>> with one_line("cannot read a.json", "mend it"):
    ...     [][0]
    Traceback (most recent call last):
    lm.mapping.UserError: cannot read a.json: list index out of range; mend it
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        known = isinstance(error, OSError) and error.strerror
        known = known or (isinstance(error, KeyError) and f"there is no {error}")
        reason = " ".join(str(known or error).split())[:200] or type(error).__name__
        message = f"{what}: {reason}" + (f"; {advice}" if advice else "")
        raise UserError(message.replace("\n", "\\n")) from error


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      UserError: the file cannot be read, is not JSON in UTF-8, or does not hold an object.
    """
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{path}: no such file; {advice}")
    with one_line(f"{path} is damaged or cannot be read", advice):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}, not an object")
    return value


def sync(path: Path) -> None:
    """Returns when the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems do not support this call for folders, and do not need it.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Syncs everything in a folder, before the folder is renamed to its final name."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def claim(folder: Path, maker: str) -> None:
    """Makes a folder of results if it does not exist, and marks it with a command, such as "train".

    Raises:
      UserError: another command made the folder and left something in it.
      OSError: the folder cannot be made.
    """
    mark = folder / MARK
    made = mark.read_text(encoding="utf-8", errors="replace").strip() if mark.exists() else maker
    made = made.removeprefix("launch.")  # as earlier versions wrote it
    if made != maker and any(path != mark for path in folder.iterdir()):
        raise UserError(
            f"--workdir={folder} was made by espalier {made}, not by espalier {maker} "
            f"(see {MARK}); choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if made != maker or not mark.exists():
        replace(mark, f"{maker}\n")


def lock(file: IO[Any], *, is_waiting: bool = False) -> bool:
    """Tries to lock an open file; returns whether this process now holds the lock. It holds it
    until it closes the file or ends, however it ends. With `is_waiting` it waits for the current
    holder.

    Raises:
      OSError: the file system has no locks, or another failure.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in HELD:
            return False
        code = errno.ENOLCK if error.errno in NO_LOCKS else error.errno
        reason = "its file system has no locks (flock)" if code == errno.ENOLCK else error.strerror
        raise OSError(code, reason, file.name) from None
    return True


def message_of(error: BaseException) -> str | None:
    """A failure of the operating system in one line, with what to do; None for other errors.
    Libraries in Rust and C++ raise other exception types, with the system's error code in the
    text. Running out of memory is handled here too.
    """
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {advice(error)}"
    text = " ".join(str(error).split())[:200]
    if text.startswith("Symlink loop"):  # raised by pathlib, which drops the error code
        return f"{text}; {advice(OSError(errno.ELOOP, text))}"
    if isinstance(error, MemoryError) or text.startswith(OUT_OF_MEMORY):
        return f"too little memory: {text or 'no more was given'}; ask for less at a time"
    if (found := CODES.search(str(error))) is None:
        return None
    failure = OSError(int(found[1]), os.strerror(int(found[1])))
    return f"{failure.strerror} ({text}); {advice(failure)}"


def short(path: Path) -> str:
    """A path as one would type it in the current folder: relative if it lies inside it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def last_line(text: str, otherwise: str = "no output") -> str:
    """The last line that a failed process printed; `otherwise` if it printed nothing.

    >>> last_line("Traceback ...\\nValueError: no\\n")
    'ValueError: no'
    """
    return (text.strip().splitlines() or [otherwise])[-1]


def advice(error: OSError) -> str:
    """What to do about a failure of the operating system."""
    return _ADVICE.get(error.errno or 0, "mend that and run the same command again")
