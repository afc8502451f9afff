"""Splits: which text of a source is held out for validation. There are three rules:

    by hash   Whole documents: those whose sha256(key), read as a fraction in [0, 1), is below
              `valid_fraction`. Adding or removing other documents does not change this.
    by rank   If the hashes select none or all of n documents, but n is large enough to hold out
              whole ones (n valid_fraction >= 1, n (1 - valid_fraction) >= 1): the documents with
              the smallest hashes, in the number nearest to the share.
    tails     Otherwise: the last part of every document, by bytes or tokens, at least one
              character. It is cut at the beginning of a line if one is near, or else before a
              space, or else between two characters.

So even a single file has a training and a validation part, however small the share.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lm.readers import Data

HASH, RANK, TAILS = "hash", "rank", "tails"
_WINDOW = 1 << 16  # bytes around the cut that are searched for the beginning of a line or word


class Split(NamedTuple):
    """Documents whose fraction is below `threshold` are held out, unless the rule is TAILS."""

    rule: str
    threshold: float


def fraction_of(key: str) -> float:
    """sha256 of a key as a fraction in [0, 1)."""
    # A key may hold a lone surrogate: from JSON, or from a file name that is not UTF-8.
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    return int(digest[:16], 16) / 2.0**64


def is_valid(key: str, threshold: float) -> bool:
    """Whether the document with this key is held out.

    >>> [is_valid(f"{i}.py", 0.5) for i in range(6)]
    [True, True, False, False, True, False]
    """
    return fraction_of(key) < threshold


def choose(keys: Iterable[str], valid_fraction: float) -> Split:
    """The split of the documents with these keys. It reads keys only until the split is decided.

    >>> choose(["a", "b", "c"], 0.5).rule, choose(["a"], 0.5).rule
    ('hash', 'tails')
    """
    if not 0 < valid_fraction < 1:
        return Split(HASH, valid_fraction)
    found = array("d")
    sides: set[bool] = set()
    for key in keys:
        found.append(fraction_of(key))
        sides.add(found[-1] < valid_fraction)
        if len(sides) == 2:
            return Split(HASH, valid_fraction)
    ordered, wanted = sorted(found), len(found) * valid_fraction
    # Copies of one document have equal hashes; they are never separated.
    cuts = [n for n in range(1, len(ordered)) if ordered[n - 1] < ordered[n]]
    if cuts and 1 <= wanted <= len(ordered) - 1:
        return Split(RANK, ordered[min(cuts, key=lambda n: abs(n - wanted))])
    return Split(TAILS, 0.0)


def tail(data: Data | np.ndarray, valid_fraction: float) -> int:
    """Where the held-out part of a text, or of token ids, begins: 0 < place < len(data). A single
    character or id cannot be split and gives len(data).

    >>> tail(b"one line\\nanother line\\nthe last", 0.3)
    22
    """
    size = len(data)
    if size < 2:
        return size
    wanted = size - min(size - 1, max(1, round(size * valid_fraction)))
    if isinstance(data, np.ndarray):
        return wanted
    near = min(_WINDOW, min(wanted, size - wanted) // 2)
    around = bytes(data[wanted - near : wanted + near])
    for places in (_after(around, b"\n"), _before(around, b" ")):
        inside = [p + wanted - near for p in places if 0 < p + wanted - near < size]
        if inside:
            return min(inside, key=lambda place: abs(place - wanted))
    begins = lambda place: place == size or data[place] & 0xC0 != 0x80  # of a letter in UTF-8
    before = next(p for p in range(wanted, -1, -1) if begins(p))
    return before or next(p for p in range(1, size + 1) if begins(p))


def _after(text: bytes, mark: bytes) -> Iterator[int]:
    return (place + 1 for place in _before(text, mark))


def _before(text: bytes, mark: bytes) -> Iterator[int]:
    place = text.find(mark)
    while place >= 0:
        yield place
        place = text.find(mark, place + 1)
