"""Batches as global arrays: which process loads which rows, and that every device gets
its piece.
"""

from __future__ import annotations

import numpy as np
import pytest

from lm.data.batch import WHOLE, Share
from lm.parallel import placement, sharding
from tests.lm import tiny

ROWS, TIME = 8, 24
# (data, fsdp, tensor, sequence) sizes, the process of every device, the parts that each process
# loads
HELD = [
    ((4, 2, 1, 1), [0, 0, 0, 0, 1, 1, 1, 1], [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ((1, 2, 4, 1), [0, 0, 0, 0, 1, 1, 1, 1], [(0,), (1,)]),
    ((1, 1, 1, 8), [0, 0, 0, 0, 1, 1, 1, 1], [(0,), (0,)]),
    ((2, 1, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0,), (0,), (1,), (1,)]),
    ((2, 1, 1, 4), [0, 1, 0, 1, 0, 1, 0, 1], [(0, 1), (0, 1)]),
    ((4, 1, 1, 3), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [(0, 1), (1, 2), (2, 3)]),
    ((8, 1, 1, 1), [0, 0, 1, 1, 0, 0, 1, 1], [(0, 1, 4, 5), (2, 3, 6, 7)]),
    ((1, 1, 2, 1), [0, 1], [(0,), (0,)]),
]


@pytest.mark.parametrize(("sizes", "holders", "parts"), HELD)
def test_every_device_gets_its_piece_from_its_process(
    sizes: tuple[int, ...], holders: list[int], parts: list[tuple[int, ...]]
) -> None:
    """Including processes that share the tokens of rows, or hold rows far from each other."""
    ways, ranks = sizes[0] * sizes[1], sizes[3]
    grid = np.reshape(holders, sizes)
    whole = np.arange(ROWS * TIME).reshape(ROWS, TIME)
    rows, columns = ROWS // ways, TIME // ranks
    for process, held in enumerate(parts):
        share = placement.share_of(grid, ways, process)
        assert share == Share(held, ways)
        loaded = whole[share.rows(ROWS)]
        for data, fsdp, _, rank in np.argwhere(grid == process).tolist():
            part = data * sizes[1] + fsdp
            # JAX writes an axis that is not split as slice(None).
            place = (
                slice(rows * part, rows * (part + 1)) if ways > 1 else slice(None),
                slice(columns * rank, columns * (rank + 1)) if ranks > 1 else slice(None),
            )
            np.testing.assert_array_equal(placement.piece(loaded, share, place), whole[place])


@pytest.mark.parametrize(
    "ways", [{"sequence": 8}, {"data": 2, "sequence": 4}, {"fsdp": 4, "tensor": 2}, {}], ids=str
)
def test_put(ways: dict[str, int]) -> None:
    split, batch = tiny.mesh(**ways), tiny.batch(rows=ROWS, time=TIME)
    assert placement.share(split).rows(ROWS) == WHOLE.rows(ROWS) == list(range(ROWS))
    for host, placed in zip(batch, placement.put(batch, split, "contiguous"), strict=True):
        assert placed.sharding.is_equivalent_to(sharding.batch(split), 2)
        assert placed.dtype == host.dtype
        np.testing.assert_array_equal(placed, host)


def test_columns_in_zigzag() -> None:
    """Rank r of R holds pieces r and 2 R - 1 - r of a row. With one rank the row is unchanged."""
    split = tiny.mesh(sequence=2)
    order = [0, 1, 6, 7, 2, 3, 4, 5]
    assert placement.columns(8, split, "zigzag").tolist() == order
    assert placement.columns(8, tiny.mesh(), "zigzag").tolist() == list(range(8))
    assert placement.columns(8, split, "contiguous").tolist() == list(range(8))
    batch = tiny.batch(rows=2, time=8)
    placed = placement.put(batch, split, "zigzag")
    for host, device in zip(batch, placed, strict=True):
        np.testing.assert_array_equal(device, host[:, order])


def test_rows_of_other_lengths_divide_over_time() -> None:
    lengths = {1: [1, 4, 8, 32, 64], 3: [3, 6, 9, 33, 66], 8: [8, 8, 8, 32, 64]}
    for ranks, expected in lengths.items():
        split = tiny.mesh(sequence=ranks)
        found = [placement.row_length(n, split, "contiguous") for n in (1, 4, 5, 32, 33)]
        assert found == expected
    assert placement.row_length(33, tiny.mesh(sequence=3), "zigzag") == 66
    assert placement.row_length(3, tiny.mesh(sequence=3), "zigzag") == 6
