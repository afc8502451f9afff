"""Names that must be of a list: the nearest is told."""

import difflib


def check(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"unknown {what} {name!r}; nearest is {near[0]!r} of {', '.join(known)}")
