"""Tables of result files as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    >>> table(("a", "b"), [("1", "")])
    '| a | b |\\n|---|---|\\n| 1 | |\\n'
    """

    def line(cells: Sequence[str]) -> str:
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"

    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(map(line, rows))


def missed(result: Mapping[str, Any]) -> str:
    """The text to put after the value of a bench result: " (missed)" if its goal is not met."""
    return "" if result["goal"] is None or result["goal"]["met"] else " (missed)"
