"""Files that are whole or not there, and failures of those who read them in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lm.mapping import UserError


def replace(path: Path, content: str | bytes) -> None:
    """Writes a whole file, or leaves what was there: a kill at any time leaves one of the two.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A name of a file that is not UTF-8 comes as half surrogate pairs, which are shown escaped.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_line(what: str, advice: str = "") -> Iterator[None]:
    """Around calls of a library that reads what a user gave: whatever it raises becomes one line,
    "WHAT: the reason; ADVICE". Readers of formats raise what they please, and those written in Rust
    panic with exceptions that are no Exception, so there is no list of kinds here.

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
        reason = " ".join(str(known or error).split())[:200] or type(error).__name__
        told = f"{what}: {reason}" + (f"; {advice}" if advice else "")
        raise UserError(told.replace("\n", "\\n")) from error
