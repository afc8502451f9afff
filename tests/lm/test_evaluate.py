"""Scores against sums written out by hand; no model, no device work."""

import io
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lm import evaluate
from lm.data.batch import Batch

END = 4
TOKEN_BYTES = np.array([1, 2, 3, 4, 0], np.int32)  # id END has none


def batch(targets: Any, positions: Any, sources: Any, weights: Any) -> Batch:
    ints = [np.array([x], np.int32) for x in (targets, positions, sources)]
    zeros = np.zeros_like(ints[0])
    return Batch(zeros, ints[0], zeros, ints[1], ints[2], np.array([weights], np.float32))


# token_nll below gives 10 * batch + place.
BATCHES = [
    batch([0, 1, END, 2, 3, 0], [0, 1, 2, 0, 1, 5], [0] * 6, [1, 1, 1, 1, 1, 0]),
    batch([3, 3, 0, 0, 0, 0], [3, 4, 8, 0, 0, 0], [2] * 6, [0.5, 1, 1, 0, 0, 0]),
]


class Device:
    """Counts calls; the value of a place that is padding is not finite."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def put(self, batch: Batch) -> Batch:
        self.calls.append("put")
        return batch

    def token_nll(self, params: Any, batch: Batch) -> Any:
        assert params == "params"
        number = self.calls.count("nll")
        self.calls.append("nll")
        places = np.arange(batch.targets.size, dtype=np.float32)[None]
        values = 10.0 * number + places
        return np.where(batch.loss_weights > 0, values, np.inf)


def score(batches: Any = None, **changes: Any) -> evaluate.Report:
    device = Device()
    batches = BATCHES if batches is None else batches
    return evaluate.evaluate(
        device.token_nll, device.put, "params", batches, TOKEN_BYTES, **changes
    )


def test_totals() -> None:
    got = score()
    nll = (0 + 1 + 2 + 3 + 4) + (0.5 * 10 + 11 + 12)
    assert got.loss == pytest.approx(nll / 7.5)
    text = nll - 2  # the end of text at place 2
    assert got.bpb == pytest.approx(text / math.log(2) / (1 + 2 + 3 + 4 + 0.5 * 4 + 4 + 1))
    assert got.is_complete


def test_by_position() -> None:
    got = score()
    assert got.position_ranges == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [s.nll for s in got.by_position] == [0 + 3, 1 + 4, 2 + 5, 11, 12]
    assert [s.num_tokens for s in got.by_position] == [2, 2, 1.5, 1, 1]
    assert sum(got.by_position, evaluate.Score()) == got.total


def test_by_source() -> None:
    got = score()
    assert set(got.by_source) == {0, 2}
    assert got.by_source[0].nll == 10
    assert got.by_source[2].loss == pytest.approx(28 / 2.5)


def test_many_small_terms_do_not_drift() -> None:
    """0.1 added 200,000 times: float32 sums are off in the third digit."""
    many = batch([0] * 1000, [0] * 1000, [0] * 1000, [1] * 1000)
    nll: Any = np.full((1, 1000), 0.1, np.float32)
    got = evaluate.evaluate(lambda p, b: nll, lambda b: b, None, [many] * 200, TOKEN_BYTES)
    assert got.loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_stop_is_asked_between_batches() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    got = score(stop=stop)
    assert not got.is_complete
    assert got.total.num_tokens == 5, "the batch under way is finished and counted"


def test_nothing_scored_is_nan() -> None:
    got = score(stop=lambda: True)
    assert math.isnan(got.loss)
    assert math.isnan(got.bpb)
    assert math.isnan(score([]).loss)


def test_the_next_batch_is_dispatched_before_a_result_is_read() -> None:
    events: list[str] = []

    class Lazy:
        def __init__(self, name: str) -> None:
            self.name = name

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            events.append(f"read {self.name}")
            return np.zeros((1, 6), dtype)

    def token_nll(params: Any, batch: Batch) -> Any:
        events.append("dispatch")
        return Lazy(str(events.count("dispatch")))

    def batches() -> Iterator[Batch]:
        yield from [BATCHES[0]] * 3

    evaluate.evaluate(token_nll, lambda b: b, None, batches(), TOKEN_BYTES)
    assert events == ["dispatch", "dispatch", "read 1", "dispatch", "read 2", "read 3"]


def test_mapping_is_json_and_tables_show_it() -> None:
    mapping = score().to_mapping(["code", "none", "prose"])
    assert json.loads(json.dumps(mapping)) == mapping
    assert list(mapping["by_source"]) == ["code", "prose"]
    assert mapping["by_position"][2] | {"bpb": 0} == {
        "first": 2, "last": 3, "loss": 7 / 1.5, "bpb": 0, "tokens": 2, "bytes": 2,
    }  # fmt: skip
    short = score([BATCHES[0]]).to_mapping(["code"])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*evaluate.tables({"long": mapping, "short": short}))
    text = console.export_text()
    assert "8-15" in text
    assert f"{short['bpb']:.4f}" in text


def test_what_was_not_counted_is_null() -> None:
    """A bucket of end of text alone has no bits per byte; one without tokens is not there."""
    mapping = score([batch([0, END, 0], [0, 1, 3], [0] * 3, [1, 1, 0])]).to_mapping(["code"])
    assert [place["last"] for place in mapping["by_position"]] == [0, 1]
    assert mapping["by_position"][1]["bpb"] is None
    json.dumps(mapping, allow_nan=False)
    evaluate.tables({"code": mapping})
