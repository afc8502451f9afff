"""A process reads its share of the rows of a batch, on any set of devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lm.config import DataConfig, UserError
from lm.data import loader
from lm.data.batch import WHOLE, Batch, Share
from lm.data.growth import Batches
from lm.data.loader import Loader
from lm.data.prepare import Prepared, prepare
from lm.parallel import placement
from tests.lm import tiny


@pytest.fixture
def prepared(config: DataConfig, tmp_path: Path) -> Prepared:
    return prepare(config, tmp_path / "prepared", progress=False)


def create(prepared: Prepared, config: DataConfig, share: Share, begin: int = 0) -> Loader:
    stream = loader.create(prepared, config, seed=0, batches=Batches(4), share=share)
    stream.set_state({"next_step": begin})
    return stream


def assert_equal(found: Batch, expected: Batch) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("share", "rows"),
    [
        (Share((0,), 2), [0, 1]),
        (Share((1,), 2), [2, 3]),
        (Share((1, 3), 4), [1, 3]),
        (Share((0,), 1), [0, 1, 2, 3]),
    ],
)
def test_a_share_is_rows_of_the_global_batch(
    config: DataConfig, prepared: Prepared, share: Share, rows: list[int]
) -> None:
    with (
        create(prepared, config, WHOLE, 3) as whole,
        create(prepared, config, share, 3) as found,
    ):
        for _ in range(10):
            assert_equal(next(found), Batch(*(field[rows] for field in next(whole))))
    with pytest.raises(UserError, match=r"4 rows is not a multiple of the 3 parts of data\*fsdp"):
        create(prepared, config, Share((0,), 3))


def test_a_stream_resumes_on_another_sequence_size(config: DataConfig, prepared: Prepared) -> None:
    """Runs on 2, 4, 8 devices that share the tokens of each row, then on 1, read the batches of one
    device.
    """
    with create(prepared, config, WHOLE) as stream:
        expected, identity, step = [next(stream) for _ in range(8)], stream.identity, 0
    for ways in ({"sequence": 2}, {"sequence": 4}, {"data": 2, "sequence": 4}, {}):
        mesh = tiny.mesh(**ways)
        with create(prepared, config, placement.share(mesh), step) as stream:
            loader.check_identity(identity, stream.identity)
            for _ in range(2):
                batch = next(stream)
                assert_equal(batch, expected[step])
                assert_equal(placement.put(batch, mesh, "contiguous"), expected[step])
                step += 1
            assert stream.state() == {"next_step": step}
