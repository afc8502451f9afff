"""Checks names against a list, with a hint for a name that is not in it."""

import difflib
from collections.abc import Iterable


def near(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` probably means, or None. `word` may be that name with a typing
    error ("wds" for "wsd"), or a part of it ("vocab" of "vocab_size").
    """
    known = sorted(known)
    if exchanged := [name for name in known if sorted(name) == sorted(word)]:
        return exchanged[0]
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.75):
        return close[0]
    parts = [name for name in known if len(word) > 2 and word.lower() in name.lower()]
    return min(parts, key=len, default=None)


def nearest(word: str, known: Iterable[str]) -> str:
    """A short hint for an unknown word: the name that it probably means, or else all names."""
    known = sorted(known)
    close = near(word, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"


def check(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError for a name that is not known."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
