"""Files that are whole or not there, locks on them, and failures in one line with what to do."""

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

# What flock says where another process holds the lock, and where the file system has no locks.
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
MARK = ".made_by"  # in a folder of results
# How libraries write the code of a failure: safetensors and other Rust, tensorstore.
CODES = re.compile(r"(?:\(os error |\bos_error_code='|\[Errno |\bOS error )(\d+)")
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory"  # of a device, as XLA begins to tell it
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
    """Writes a whole file, or leaves what was there: a kill at any time, of the process or of the
    machine, leaves one of the two.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A name of a file that is not UTF-8 comes as half surrogate pairs, which are shown escaped.
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
    """Around calls of a library that reads what a user gave: whatever it raises becomes one line,
    "WHAT: the reason; ADVICE". Readers of formats raise what they please, and those written in Rust
    panic with exceptions that are not an Exception, so there is no list of kinds here.

    Raises:
      UserError: the library raised anything, or this was raised inside.

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
        told = f"{what}: {reason}" + (f"; {advice}" if advice else "")
        raise UserError(told.replace("\n", "\\n")) from error


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object that a file is.

    Raises:
      UserError: it cannot be read, is not JSON in UTF-8, or is not an object.
    """
    with one_line(f"{path} is damaged or cannot be read", advice):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}, not an object")
    return value


def sync(path: Path) -> None:
    """Returns when what a file holds, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems have no such call for folders, and need none.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """The same for all that is in a folder, before it gets its name."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def claim(folder: Path, maker: str) -> None:
    """Makes a folder of results if need be, and marks it as that of a command, as "train".

    Raises:
      UserError: another command made it, and has left something there.
      OSError: it cannot be made.
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
    """Whether the lock of an open file is now this process's, which holds it until it closes the
    file or ends, however it ends; `is_waiting`: it waits for who holds it.

    Raises:
      OSError: its file system has no locks, or another failure.
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


def told(error: BaseException) -> str | None:
    """A failure of the operating system in one line, with what to do; None of other errors.
    Libraries written in Rust and C++ raise theirs as other kinds, with the system's code in the
    text; memory that runs out is told likewise.
    """
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {advice(error)}"
    text = " ".join(str(error).split())[:200]
    if text.startswith("Symlink loop"):  # of pathlib, which drops the code
        return f"{text}; {advice(OSError(errno.ELOOP, text))}"
    if isinstance(error, MemoryError) or text.startswith(OUT_OF_MEMORY):
        return f"too little memory: {text or 'no more was given'}; ask for less at a time"
    if (found := CODES.search(str(error))) is None:
        return None
    failure = OSError(int(found[1]), os.strerror(int(found[1])))
    return f"{failure.strerror} ({text}); {advice(failure)}"


def short(path: Path) -> str:
    """A path as it is written in the current folder: without that folder, where it lies there."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def last_line(text: str, otherwise: str = "no output") -> str:
    """What a process that failed said last; `otherwise` if it said nothing.

    >>> last_line("Traceback ...\\nValueError: no\\n")
    'ValueError: no'
    """
    return (text.strip().splitlines() or [otherwise])[-1]


def advice(error: OSError) -> str:
    """What to do about a failure of the operating system."""
    return _ADVICE.get(error.errno or 0, "mend that and run the same command again")
