"""Batch-size warmup: which rows come when, and which warmups are refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import DataConfig, UserError
from lm.data import config as data_config
from lm.data import growth, loader
from lm.data.batch import Share
from lm.data.growth import NO_WARMUP, Batches, BatchWarmup
from lm.data.prepare import Prepared, prepare
from lm.mapping import Duration

GROWING = Batches(size=16, doublings=2, span=3)


@pytest.fixture
def prepared(config: DataConfig, tmp_path: Path) -> Prepared:
    return prepare(config, tmp_path / "prepared", progress=False)


def warmup(first: int, length: str = "100 tokens", rate_exponent: float = 0.0) -> BatchWarmup:
    return BatchWarmup(
        first=first, length=Duration.parse(length, "length"), rate_exponent=rate_exponent
    )


def test_every_size_takes_the_rows_of_whole_full_batches() -> None:
    sizes = [GROWING.of(step) for step in range(22)]
    assert sizes == [4] * 12 + [8] * 6 + [16] * 4
    assert GROWING.warmup_steps == 18
    assert GROWING.before(18) == 2 * 3 * 16
    assert [GROWING.before(i) for i in range(23)] == [0, *itertools.accumulate(sizes)]


@pytest.mark.parametrize("batches", [GROWING, Batches(16), Batches(2, 1, 1)])
def test_steps_is_the_inverse_of_before(batches: Batches) -> None:
    for step in range(40):
        rows = batches.before(step)
        assert batches.steps(rows) == step
        assert batches.steps(rows + batches.of(step) / 2) == step + 0.5


@pytest.mark.parametrize(
    ("length", "span"), [("1 tokens", 1), ("512 tokens", 1), ("513 tokens", 2), ("4 steps", 2)]
)
def test_lengths_are_rounded_up(length: str, span: int) -> None:
    """Two sizes come before 16 rows of 16 tokens; 512 tokens are one full batch for each."""
    assert growth.batches(16, warmup(4, length), 16) == Batches(16, 2, span)
    assert growth.batches(16, NO_WARMUP, 16) == Batches(16)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_rows_come_in_the_order_of_one_batch_size(
    config: DataConfig, prepared: Prepared, num_ranks: int
) -> None:
    def rows(batches: Batches, steps: int) -> np.ndarray:
        """The tokens of all rows, with the shares of the ranks joined."""
        found: list[Any] = []
        for rank in range(num_ranks):
            options: dict[str, Any] = {"seed": 0, "share": Share((rank,), num_ranks)}
            with loader.create(prepared, config, batches=batches, **options) as stream:
                found.append([next(stream).tokens for _ in range(steps)])
        return np.concatenate([np.concatenate(parts) for parts in zip(*found, strict=True)])

    assert np.array_equal(rows(GROWING, 20), rows(Batches(4), GROWING.before(20) // 4))


def test_a_stream_that_grows_resumes_anywhere(config: DataConfig, prepared: Prepared) -> None:
    with loader.create(prepared, config, seed=0, batches=GROWING) as stream:
        whole = [next(stream).tokens for _ in range(20)]
    for step in (0, 5, 12, 13, 18, 19):
        with loader.create(prepared, config, seed=0, batches=GROWING) as stream:
            stream.set_state({"next_step": step})
            assert np.array_equal(next(stream).tokens, whole[step])
            assert stream.state() == {"next_step": step + 1}


def test_another_growth_is_another_stream(config: DataConfig, prepared: Prepared) -> None:
    def identity(batches: Batches) -> dict[str, Any]:
        return loader.identity(prepared, config, 0, batches)

    assert "batch_warmup" not in identity(Batches(16))
    with pytest.raises(UserError, match=r"length was 1536 tokens, is 2048 tokens; restore"):
        loader.check_identity(identity(GROWING), identity(Batches(16, 2, 4)))


@pytest.mark.parametrize(
    ("batch_size", "given", "message"),
    [
        (16, warmup(6), "first=6 does not double to data.batch_size=16; set data.batch_warmup.fir"),
        (16, warmup(16), "set data.batch_warmup.first=8"),
        (16, warmup(32), "set data.batch_warmup.first=8"),
        (15, warmup(5), "first=5 does not double to data.batch_size=15; set data.batch_size=10"),
        (16, warmup(4, "10 percent"), "length=10 percent must be a positive number of tokens or"),
        (16, warmup(4, "0 tokens"), "length=0 tokens must be a positive number of tokens or steps"),
        (16, warmup(0), "first=0 with length=100 tokens, rate_exponent=0; set first=1 or more"),
        (
            16,
            warmup(0, "0 tokens", 0.5),
            "set first=1 or more rows, or set length='0 tokens' and rate_exponent=0",
        ),
    ],
)
def test_bad_warmups_are_refused(
    config: DataConfig, batch_size: int, given: BatchWarmup, message: str
) -> None:
    changed = dataclasses.replace(config, batch_size=batch_size, batch_warmup=given)
    with pytest.raises(UserError, match=r"data\.batch_warmup\.") as caught:
        data_config.check(changed)
    assert message in str(caught.value)


def test_the_remedy_in_the_message_works(config: DataConfig) -> None:
    good = dataclasses.replace(config, batch_size=16, batch_warmup=warmup(8))
    data_config.check(good)
