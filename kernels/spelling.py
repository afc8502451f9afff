"""Names that must be of a list, and the hint for one that is not."""

import difflib
from collections.abc import Iterable


def near(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` probably means: one with a slip of the keyboard in it ("wds" for
    "wsd"), or one of which `word` is a part ("vocab" of "vocab_size"); None if there is none.
    """
    known = sorted(known)
    if exchanged := [name for name in known if sorted(name) == sorted(word)]:
        return exchanged[0]
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.75):
        return close[0]
    parts = [name for name in known if len(word) > 2 and word.lower() in name.lower()]
    return min(parts, key=len, default=None)


def nearest(word: str, known: Iterable[str]) -> str:
    """A short hint for an unknown word: the name that it probably means, else all names."""
    known = sorted(known)
    close = near(word, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"


def check(what: str, name: str, known: Iterable[str]) -> None:
    """ValueError for a name that is not known."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
