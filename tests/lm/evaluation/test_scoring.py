"""The scorer's batches, buckets and order of rows; the model is a function of the batch."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lm import build as build_lib
from lm.build import Build
from lm.config import UserError
from lm.data.batch import Batch
from lm.evaluation.scoring import Cost, Row, Scorer, row
from lm.run import checkpoint
from tests.lm import tiny
from tests.lm.lab import Lab


class Device:
    """A stand-in for a build's `score`: nll is the token, hit is whether the target is even. Both
    are garbage at places that are not scored.
    """

    def __init__(self, built: Build) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.events: list[str] = []
        self.built = dataclasses.replace(built, score=self.score)

    def score(self, params: Any, batch: Batch) -> tuple[Any, Any]:
        assert params == "params"
        self.shapes.append(batch.tokens.shape)
        self.events.append("dispatch")
        used = np.asarray(batch.loss_weights) > 0
        tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
        return self.lazy(np.where(used, tokens, np.nan)), (targets % 2 == 0) | ~used

    def lazy(self, values: np.ndarray) -> Any:
        events, number = self.events, str(self.events.count("dispatch"))

        class Lazy:
            def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
                events.append(f"read {number}")
                return values if dtype is None else values.astype(dtype)

        return Lazy()


@pytest.fixture(scope="module")
def built() -> Build:
    return tiny.create()


def test_rows_come_back_in_their_order_and_length(built: Build) -> None:
    device = Device(built)
    rng = np.random.default_rng(0)
    rows = [row(rng.integers(1, 90, n), first=1 + n // 3) for n in (2, 400, 33, 5, 25, 34, 64)]
    scored = Scorer(device.built, "params")(rows)
    for one, found in zip(rows, scored, strict=True):
        used = one.weights > 0
        np.testing.assert_array_equal(found.nll, np.where(used, one.tokens, 0))
        np.testing.assert_array_equal(found.hit, used & (one.targets % 2 == 0))
        assert (found.nll.dtype, found.hit.dtype) == (np.float32, np.bool_)


def test_each_bucket_has_one_shape(built: Build) -> None:
    """Each bucket compiles at most once. No batch is larger than a training step's unless a single
    row is. The context length, 24, is a bucket of its own.
    """
    device = Device(built)
    rows = [row(np.ones(n, np.int32)) for n in [*range(2, 140), 25, 25, 25]]
    scorer = Scorer(device.built, "params")
    scorer(rows)
    by_length: dict[int, set[tuple[int, ...]]] = {}
    for shape in device.shapes:
        by_length.setdefault(shape[1], set()).add(shape)
    assert sorted(by_length) == sorted(scorer.buckets) == [24, 32, 64, 128, 256]
    assert all(len(shapes) == 1 for shapes in by_length.values())
    limit = built.config.tokens_per_step
    assert all(b * t <= limit or b == 1 for b, t in device.shapes)


def test_devices_that_share_rows_divide_every_bucket() -> None:
    built = tiny.create({"mesh.data": 1, "mesh.sequence": 6}, 6)
    device = Device(built)
    rows = [row(np.arange(1, n)) for n in (3, 30, 40)]
    for one, found in zip(rows, Scorer(device.built, "params")(rows), strict=True):
        np.testing.assert_array_equal(found.nll, np.where(one.weights > 0, one.tokens, 0))
    assert {time for _, time in device.shapes} == {24, 36, 66}


def test_each_bucket_compiles_once(built: Build) -> None:
    """The model is real: two passes over five lengths in two buckets trace twice."""
    traces: list[tuple[int, ...]] = []

    def traced(params: Any, batch: Batch) -> Any:
        traces.append(batch.tokens.shape)
        return built.score(params, batch)

    scorer = Scorer(dataclasses.replace(built, score=jax.jit(traced)), tiny.params(built))
    rows = [row(np.arange(1, n)) for n in (10, 20, 24, 30, 31)]
    first, second = scorer(rows), scorer(rows)
    assert len(traces) == len(scorer.buckets) == 2
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.nll, b.nll)


def test_the_batch_a_row_is_in_does_not_matter(built: Build) -> None:
    """A row has the same numbers alone, among others and in a longer bucket."""
    scorer = Scorer(built, tiny.params(built))
    rng = np.random.default_rng(1)
    rows = [row(rng.integers(0, 60, n)) for n in (12, 20, 24)]
    together = scorer(rows)
    for one, found in zip(rows, together, strict=True):
        alone = scorer([one])[0]
        np.testing.assert_allclose(found.nll, alone.nll, rtol=1e-5)
        longer = Row(*(np.pad(field, (0, 9)) for field in one))  # 32 places are another bucket
        padded = scorer([longer])[0]
        np.testing.assert_allclose(padded.nll[: len(found.nll)], found.nll, rtol=1e-5)
        assert not padded.nll[len(found.nll) :].any()


def test_nll_and_hit_are_those_of_the_logits(built: Build) -> None:
    params = tiny.params(built)
    one = row(np.random.default_rng(2).integers(0, 60, 24))
    variables = {"params": params}
    inputs = (x[None] for x in (one.tokens, one.segment_ids, one.positions))
    hidden: Any = built.model.apply(variables, *inputs)[0]
    head: Any = built.model.apply(variables, method="head")
    size = built.config.data.tokenizer.vocab_size
    logits = np.asarray(hidden[0] @ head.T, np.float64)[:, :size]
    lse = np.log(np.exp(logits).sum(1))
    at = np.arange(len(one.targets))
    best = np.argmax(logits, 1)
    targets = np.where(at % 2, best, one.targets).astype(np.int32)  # half of them are hits
    found = Scorer(built, params)([one._replace(targets=targets)])[0]
    np.testing.assert_allclose(found.nll, lse - logits[at, targets], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.hit, best == targets)


def test_the_next_batch_is_dispatched_before_a_result_is_read(built: Build) -> None:
    device = Device(built)
    rows = [row(np.ones(25, np.int32))] * (3 * built.config.data.batch_size)
    counts: list[int] = []
    Scorer(device.built, "params")(rows, counts.append)
    assert device.events == ["dispatch", "dispatch", "read 1", "dispatch", "read 2", "read 3"]
    assert counts == [24 * built.config.data.batch_size] * 3


def test_cost_counts_tokens_without_padding(built: Build) -> None:
    scorer = Scorer(Device(built).built, "params")
    scorer([row(np.ones(11, np.int32)), row(np.ones(21, np.int32))])
    scorer([row(np.ones(11, np.int32))])
    flops = [build_lib.forward_flops(built, n) for n in (10, 20)]
    assert scorer.cost.tokens == 40
    assert scorer.cost.flops == pytest.approx(2 * flops[0] + flops[1])
    assert flops[1] > 2 * flops[0], "attention grows with the square of the length"
    assert scorer.cost.seconds > 0
    assert Cost(1, 2.0, 3.0) + Cost(1, 1.0, 1.0) == Cost(2, 3.0, 4.0)


def test_no_rows_have_no_scores(built: Build) -> None:
    assert Scorer(built, None)([]) == []


def test_a_checkpoint_is_scored_on_a_mesh(lab: Lab) -> None:
    """Eight devices, four of which share the tokens of each row, give the numbers of one device."""
    rows = [row(np.arange(2, length)) for length in (40, 21, 9)]
    scores = []
    for mesh in (None, {"data": 2, "sequence": 4, "sequence_layout": "zigzag"}):
        loaded = checkpoint.load(lab.whole, mesh=mesh)
        assert loaded.build.mesh.size == (8 if mesh else 1)
        scored = Scorer(loaded.build, loaded.params)(rows)
        scores.append(np.concatenate([one.nll for one in scored]))
    np.testing.assert_allclose(*scores, rtol=1e-5)
    with pytest.raises(UserError, match="sequence=3 needs 3 devices, found 8"):
        checkpoint.load(lab.whole, mesh={"sequence": 3})
