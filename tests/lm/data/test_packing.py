from __future__ import annotations

import doctest
import time
import types

import numpy as np
import pytest

from lm.data import batch, mixture, packing, splits
from lm.data.packing import Packer, Plan


def lengths_of(seed: int, count: int, mean: float = 4.0, sigma: float = 1.2) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(mean, sigma, count).astype(np.int64) + 1


def rows_of(plan: Plan) -> list[list[tuple[int, int, int]]]:
    pieces = list(zip(plan.doc.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(plan.row_ptr[:-1], plan.row_ptr[1:], strict=True)]


def check_covers(plan: Plan, lengths: np.ndarray, context_length: int) -> None:
    """Every pair of every document comes exactly once, and no row is too long or empty."""
    pairs = [(d, s + i) for row in rows_of(plan) for d, s, n in row for i in range(n)]
    assert sorted(pairs) == [(d, i) for d, n in enumerate(lengths.tolist()) for i in range(n)]
    sizes = [sum(n for _, _, n in row) for row in rows_of(plan)]
    assert min(sizes) > 0
    assert max(sizes) <= context_length
    assert plan.length.min() > 0


@pytest.mark.parametrize("module", [batch, mixture, packing, splits])
def test_examples(module: types.ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["concat", "best_fit"])
def test_every_pair_comes_once(name: str, seed: int) -> None:
    lengths = lengths_of(seed, 60)
    packer = Packer(lengths, 50, name, (seed,))  # pyright: ignore[reportArgumentType]
    for epoch in (0, 1):
        plan = packer.epoch(epoch)[0]
        check_covers(plan, lengths, 50)
        assert len(rows_of(plan)) == packer.num_rows
    assert packer.fill == pytest.approx(lengths.sum() / (packer.num_rows * 50))


def test_concat_pads_only_the_last_row() -> None:
    lengths = lengths_of(0, 60)
    sizes = [
        sum(n for _, _, n in row)
        for row in rows_of(Packer(lengths, 50, "concat", (0,)).epoch(0)[0])
    ]
    assert set(sizes[:-1]) == {50}
    assert sizes[-1] == (lengths.sum() - 1) % 50 + 1


def test_best_fit_keeps_short_documents_whole() -> None:
    lengths = lengths_of(1, 200)
    plan = Packer(lengths, 64, "best_fit", (0,)).epoch(0)[0]
    seen = np.bincount(plan.doc, minlength=len(lengths))
    assert np.all(seen[lengths <= 64] == 1)
    np.testing.assert_array_equal(seen, -(-lengths // 64))  # long ones: whole rows, one remainder


def first_fit_rows(lengths: list[int], capacity: int) -> int:
    bins: list[int] = []
    for length in lengths:
        at = next((i for i, used in enumerate(bins) if used + length <= capacity), None)
        if at is None:
            bins.append(length)
        else:
            bins[at] += length
    return len(bins)


def best_fit_slowly(lengths: list[int], capacity: int) -> list[int]:
    """Free spaces after best fit as it is defined: every bin is tried."""
    spaces: list[int] = []
    for length in lengths:
        fits = [(space, i) for i, space in enumerate(spaces) if space >= length]
        if not fits:
            spaces.append(capacity - length)
        else:
            spaces[min(fits)[1]] -= length
    return sorted(spaces)


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_is_best_fit(seed: int) -> None:
    lengths = np.sort(np.random.default_rng(seed).integers(1, 65, 300))[::-1]
    bins = packing.best_fit_bins(lengths, 64)
    used = np.bincount(bins, weights=lengths)
    assert sorted((64 - used).astype(int)) == best_fit_slowly(lengths.tolist(), 64)
    shuffled = np.random.default_rng(0).permutation(lengths).tolist()
    assert -(-lengths.sum() // 64) <= len(used) <= first_fit_rows(shuffled, 64)


@pytest.mark.parametrize("name", ["concat", "best_fit"])
def test_epochs_and_seeds_differ_and_repeat(name: str) -> None:
    lengths = lengths_of(3, 100)

    def docs(seed: int, epoch: int) -> list[int]:
        packer = Packer(lengths, 50, name, (seed,))  # pyright: ignore[reportArgumentType]
        return packer.epoch(epoch)[0].doc.tolist()

    assert docs(0, 0) == docs(0, 0)
    assert docs(0, 0) != docs(0, 1)
    assert docs(0, 1) != docs(1, 0)


def test_few_plans_are_kept_and_any_order_gives_the_same() -> None:
    packer = Packer(lengths_of(0, 60), 50, "concat", (0,))
    forward = [packer.epoch(epoch)[0].doc.tolist() for epoch in range(5)]
    assert len(packer._epochs) == 2
    assert [packer.epoch(epoch)[0].doc.tolist() for epoch in reversed(range(5))] == forward[::-1]


@pytest.mark.parametrize("name", ["concat", "best_fit"])
@pytest.mark.parametrize("lengths", [[1], [49], [50], [51], [100, 50], [1, 1, 1]])
def test_edges(name: str, lengths: list[int]) -> None:
    packer = Packer(np.array(lengths), 50, name, (0,))  # pyright: ignore[reportArgumentType]
    check_covers(packer.epoch(0)[0], np.array(lengths), 50)
    assert packer.num_rows == len(rows_of(packer.epoch(0)[0]))


@pytest.mark.parametrize("name", ["concat", "best_fit"])
def test_three_million_pairs_are_quick(name: str) -> None:
    lengths = lengths_of(0, 30_000)
    assert lengths.sum() > 3e6
    begin = time.perf_counter()
    Packer(lengths, 1024, name, (0,)).epoch(0)[0]  # pyright: ignore[reportArgumentType]
    assert time.perf_counter() - begin < 1.0
