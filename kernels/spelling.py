"""Names that must be of a list, and the hint for one that is not."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """A short hint for an unknown word: the nearest known one, else the list."""
    known = sorted(known)
    close = near(word, known)
    return f"known: {', '.join(known)}" if close is None else f"did you mean {close!r}?"


def near(word: str, known: Iterable[str]) -> str | None:
    """The known word that an unknown one may be a misspelling of."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def check(what: str, name: str, known: Iterable[str]) -> None:
    """ValueError for a name that is not known."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
