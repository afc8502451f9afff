"""Mixture: which source row i of the training stream comes from, and which row of that source it
is.

Each source has a share of the training tokens. Shares are kept exactly, however small they are, and
are not rounded to a period. The sources are the leaves of a Huffman tree of their shares. At a node
whose left side has the share p of the node's rows, the first n rows of the node contain

    floor(n p + 1/2)    rows of the left side, and the rest are of the right side.

So one walk from the root finds the source of a row and its number among that source's rows, without
a table, a state or drift. (Grain's own mix truncates weights to integers, the smallest to 100,
which can miss a share by a percent.)

In every prefix of the stream the count of each source is less than 2 rows off its share. A node
adds at most 1/2 to p times its own deviation: d(child) <= 1/2 + p d(node). A Huffman tree joins the
two smallest shares. So if a child is a node itself, its larger part is at least half of it and at
most as large as its sibling. Therefore p <= 2/3 and d < 3/2 for every such node, and a source is
less than 1/2 + 3/2 off.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

VERSION = 2  # of the order of rows of several sources: raise it if the same weights order them anew


class _Node(NamedTuple):
    """A node sends `part` of every `whole` rows left. A side is a node or the index of a source."""

    part: int
    whole: int
    left: _Node | int
    right: _Node | int


class Mixture:
    """Maps row i of the stream to (source, row within that source). `shares` must be positive."""

    def __init__(self, shares: Sequence[float | Fraction]):
        self._root = _tree([Fraction(share) for share in shares])

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The source of a row of the stream, and the row's number within the source.

        >>> mixture = Mixture([0.7, 0.2, 0.1])
        >>> "".join("abc"[mixture[i][0]] for i in range(20))
        'abaacaaabaabaacaaaba'
        """
        node = self._root
        while isinstance(node, _Node):
            before = _rounded(index * node.part, node.whole)
            if _rounded((index + 1) * node.part, node.whole) > before:
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index


def _rounded(a: int, b: int) -> int:
    return (2 * a + b) // (2 * b)


def _tree(shares: Sequence[Fraction]) -> _Node | int:
    """The Huffman tree. Among equal shares, earlier sources, then earlier nodes, are joined
    first.
    """
    heap: list[tuple[Fraction, int, _Node | int]] = [(x, i, i) for i, x in enumerate(shares)]
    heapq.heapify(heap)
    for number in range(len(heap), 2 * len(heap) - 1):
        small, _, right = heapq.heappop(heap)
        large, _, left = heapq.heappop(heap)
        share = large / (large + small)
        node = _Node(share.numerator, share.denominator, left, right)
        heapq.heappush(heap, (large + small, number, node))
    return heap[0][2]
