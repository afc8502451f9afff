"""Reads a line of JSON with long strings, using memory of about the line and its text.

Strings over 1 MiB are cut out of a line over 16 MiB, so that what remains is small. The string that
is asked for is returned as UTF-8 bytes, unescaped piece by piece. Python's own reader would make
one string of the line and another of the text, each with up to four bytes per character.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

LONG_LINE, LONG_STRING, _PIECE = 1 << 24, 1 << 20, 1 << 22  # bytes
# Possessive quantifiers (++, *+): the matcher keeps no state to backtrack.
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_UNITS = re.compile(rb"(?:[^\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+", re.DOTALL)


def loads(line: bytes, key: str) -> Any:
    """The value of a line of JSON in UTF-8. In a long line, a long string under `key` is returned
    as bytes, and every other long string is replaced by a short one.

    Raises:
      ValueError: it is not JSON, or it is not UTF-8, or a long string holds a lone surrogate (the
      last two are UnicodeError).
      RecursionError: it is nested too deeply.
    """
    if len(line) < LONG_LINE:
        return json.loads(str(line, "utf-8"))
    mark = hashlib.sha256(line).hexdigest()  # cannot occur in the line: no line holds its own hash
    spans: dict[str, tuple[int, int]] = {}
    rest, done = [], 0
    for match in _STRING.finditer(line):
        if match.end() - match.start() >= LONG_STRING:
            name = f"{mark}{len(spans)}"
            rest += [line[done : match.start()], f'"{name}"'.encode()]
            spans[name], done = match.span(1), match.end()
    rest.append(line[done:])
    record = json.loads(str(b"".join(rest), "utf-8"))
    asked = record.get(key) if isinstance(record, dict) else None
    if isinstance(asked, str) and asked in spans:
        record[key] = _unescaped(line, *spans[asked])
    return record


def _unescaped(line: bytes, start: int, end: int) -> bytearray:
    """The string between two quotes. A cut may separate the two surrogates of a pair."""
    found, before = bytearray(), ""
    while start < end:
        match = _UNITS.match(line, start, min(start + _PIECE, end))
        stop = match.end() if match else start
        while stop < end and line[stop] & 0xC0 == 0x80:
            stop -= 1
        if stop <= start:
            raise ValueError("an escape is cut short")
        text = before + json.loads(f'"{str(line[start:stop], "utf-8")}"')
        if before:  # joined, if this piece begins with the other half
            text = text[:2].encode("utf-16", "surrogatepass").decode("utf-16") + text[2:]
        before = text[-1] if "\ud800" <= text[-1] < "\udc00" and stop < end else ""
        found += (text[:-1] if before else text).encode()
        start = stop
    return found
