"""The tasks that every run has, against sums written out by hand; no test runs a model."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lm import evals
from lm.config import UserError
from lm.evals import Given, Items, Number, Scored
from lm.evals.bits_per_byte import BitsPerByte
from lm.evals.position import Position
from lm.evaluation import evaluate, statistics
from lm.evaluation.scoring import Row
from lm.families import TASKS
from tests.lm import tiny
from tests.lm.lab import Lab

END = 4


def row(targets: Any, positions: Any, weights: Any) -> Row:
    ints = [np.array(x, np.int32) for x in (targets, positions)]
    zeros = np.zeros_like(ints[0])
    return Row(zeros, ints[0], zeros, ints[1], np.array(weights, np.float32))


# Two sets. In the first, document 0 has its end of text at place 2. nll is 10 * row + place.
ROWS = [
    row([0, 1, END, 2, 3, 0], [0, 1, 2, 0, 1, 5], [1, 1, 1, 1, 1, 0]),
    row([3, 3, 0, 0, 0, 0], [3, 4, 8, 0, 0, 0], [0.5, 1, 1, 0, 0, 0]),
]
NUM_BYTES = [np.array([1, 2, 0, 3, 4, 0]), np.array([2.0, 4, 1, 0, 0, 0])]
DOCUMENTS = [np.array([0, 0, 0, 1, 1, -1]), np.array([0, 0, 0, -1, -1, -1])]
ABOUT = {
    "sets": {"code": range(1), "prose": range(1, 2)},
    "documents": DOCUMENTS,
    "num_bytes": NUM_BYTES,
}
ITEMS = Items(ROWS, ABOUT)
SCORED = [
    Scored(np.where(one.weights > 0, 10.0 * i + np.arange(6), 0), np.zeros(6, bool))
    for i, one in enumerate(ROWS)
]


@pytest.mark.parametrize(
    ("length", "share", "every", "wanted", "message"),
    [
        (1_000_000, 0.2, "25 percent", "25 percent", ""),
        # Scoring 12 tokens costs 4 of training: at least 20 lie between two evaluations.
        (80, 0.2, "25 percent", "25 percent", ""),
        (79, 0.2, "25 percent", "50 percent", "evaluated every 50 percent, not every 25 percent"),
        (30, 0.2, "25 percent", "75 percent", "evaluated every 75 percent"),
        (12, 0.2, "25 percent", "175 percent", "evaluated at the end, not every 25 percent"),
        (12, 0.0, "25 percent", "25 percent", ""),
        (12, 0.2, "3 steps", "3 steps", ""),
        (12, 0.2, "0 percent", "0 percent", ""),
    ],
)
def test_a_short_run_is_evaluated_less_often(
    length: int,
    share: float,
    every: str,
    wanted: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny.config({"evaluate.every": every, "evaluate.share": share})
    prepared = {"": evaluate.Prepared(BitsPerByte(), ITEMS)}
    found = evaluate.spaced(config, prepared, run_tokens=length)
    assert str(found) == wanted
    assert message in caplog.text
    assert bool(caplog.text) == bool(message)


def test_bits_per_byte_of_every_set_and_of_all() -> None:
    got = BitsPerByte().numbers(ITEMS, SCORED)
    first, second = 0 + 1 + 2 + 3 + 4, 0.5 * 10 + 11 + 12
    assert got["loss/code"].value == first / 5
    assert got["loss/prose"].value == second / 2.5
    assert got["bpb/code"].value == pytest.approx((first - 2) / math.log(2) / 10)
    assert got["bpb/prose"].value == pytest.approx(second / math.log(2) / 7)
    assert got["bpb"].value == pytest.approx((first - 2 + second) / math.log(2) / 17)
    assert [got[name].num for name in ("bpb", "bpb/code", "bpb/prose")] == [3, 2, 1]


def test_loss_by_position() -> None:
    got = Position().numbers(ITEMS, SCORED)
    assert [name for name in got if "@" in name] == [f"loss@{x}" for x in (0, 1, 2, 4, 8)]
    sums = {"loss@0": (3, 2), "loss@1": (5, 2), "loss@2": (2 + 5, 1.5), "loss@4": (11, 1)}
    for name, (nll, weight) in sums.items():
        assert got[name].value == pytest.approx(nll / weight), name
    assert got["loss"].value == pytest.approx((10 + 28) / 7.5)
    assert got["loss"].num == 3, "equal document numbers of two sets are two documents"


def test_many_small_terms_do_not_drift() -> None:
    """0.1 is added 200,000 times; a float32 sum would be off in the third digit."""
    many = row([0] * 1000, [0] * 1000, [1] * 1000)
    nll = Scored(np.full(1000, 0.1, np.float32), np.zeros(1000, bool))
    about = {
        "sets": {"a": range(200)},
        "documents": [np.zeros(1000, int)] * 200,
        "num_bytes": [np.ones(1000)] * 200,
    }
    got = BitsPerByte().numbers(Items([many] * 200, about), [nll] * 200)
    assert got["loss/a"].value == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_uniform_over_bytes_is_eight_bits(lab: Lab) -> None:
    """The data is that of a real run; every byte costs exactly log2 256 bits."""
    from lm.data import prepare

    config = lab.config()
    prepared = prepare.prepare(config.data, lab.root / "data", progress=False)
    given = Given(prepared.tokenizer, prepared, config.data, 10**6)
    task = BitsPerByte()
    items = task.items(given)
    nll = math.log(256)
    scored = [Scored(nll * (one.weights > 0), one.weights > 0) for one in items.rows]
    got = task.numbers(items, scored)
    for name in ("bpb", "bpb/text", "bpb/held"):
        bits = got[name]
        assert (bits.value, bits.low, bits.high) == pytest.approx((8.0, 8.0, 8.0), rel=1e-12)
    stores = [prepared.stores[name]["valid"] for name in ("text", "held")]
    assert got["bpb"].num == sum(store.num_documents for store in stores)
    weights = sum(one.weights.sum() for one in items.rows)
    assert weights == sum(store.lengths.sum() for store in stores), "each token is scored once"


@dataclasses.dataclass(frozen=True)
class Fake:
    """A task with rows of length `length`; its number is the mean of the scores."""

    length: int
    headline: str = "mean"

    def items(self, given: Any) -> Items:
        return Items([row(*[[1] * self.length] * 3)] * 2, None)

    def numbers(self, items: Items, scored: Any) -> dict[str, Number]:
        assert len(scored) == len(items.rows)
        value = statistics.mean([one.nll.mean() for one in scored], chance=self.length)
        return {"mean": value, "curve@8": value, "curve@16": value}


class FakeScorer:
    def __init__(self) -> None:
        self.cost = evaluate.Cost()

    def __call__(self, rows: Any, advance: Any) -> list[Scored]:
        for one in rows:
            advance(len(one.tokens))
        tokens = sum(len(one.tokens) for one in rows)
        self.cost += evaluate.Cost(tokens, 2.0 * tokens, 1.0)
        return [Scored(one.weights * len(one.tokens), one.weights > 0) for one in rows]


def test_results_cost_and_tables() -> None:
    tasks: Any = {"a": Fake(4), "b": Fake(6)}
    given: Any = None
    questions = evaluate.prepare(tasks, given)
    message: list[tuple[str, int]] = []
    scorer: Any = FakeScorer()
    results = evaluate.run(questions, scorer, advance=lambda *x: message.append(x))
    assert message == [("a", 4), ("a", 4), ("b", 6), ("b", 6)]
    assert [evaluate.num_tokens(x) for x in questions.values()] == [8, 12]
    assert [r.cost for r in results.values()] == [
        evaluate.Cost(8, 16.0, 1.0),
        evaluate.Cost(12, 24.0, 1.0),
    ]
    mapping = evaluate.to_mapping(results)
    assert json.loads(json.dumps(mapping, allow_nan=False)) == mapping
    assert mapping["b"]["numbers"]["mean"]["value"] == 6
    assert mapping["b"]["cost"] == {"tokens": 12, "flops": 24.0, "seconds": 1.0}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*evaluate.tables(results))
    text = console.export_text()
    assert "at chance" in text
    assert "curve at" in text
    assert "12 tokens, 24 FLOPs, 1.0 s" in text


def test_the_table_says_that_one_unit_has_no_interval() -> None:
    one = evaluate.Result({"bpb": statistics.ratio([2.0], [1.0])}, evaluate.Cost(1, 1.0, 1.0))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*evaluate.tables({"a": one}))
    text = console.export_text()
    assert "one unit: no interval" in text
    assert "nan" not in text


@pytest.mark.parametrize("task", [BitsPerByte(), Position()])
def test_a_task_without_a_validation_set_is_refused(lab: Lab, task: Any) -> None:
    """A task without one is refused before any row is made. Training goes on without the task that
    every other run has.
    """
    sources = lab.config().data.sources
    changes = {"text": dataclasses.replace(sources["text"], valid_fraction=0.0)}
    data = dataclasses.replace(lab.config().data, sources=changes)
    assert list(evaluate.always(lab.config().data)) == [evaluate.ALWAYS]
    assert evaluate.always(data) == {}
    nothing: Any = None
    with pytest.raises(UserError, match=r"^task mine: no source of data has a valid_fraction"):
        evaluate.prepare({"mine": task}, Given(nothing, nothing, data, 64))


def test_stop_is_called_between_batches() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    tasks: Any = {"a": Fake(4), "b": Fake(6)}
    given: Any = None
    scorer: Any = FakeScorer()
    with pytest.raises(evaluate.Stopped):
        evaluate.run(evaluate.prepare(tasks, given), scorer, stop)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"positions": {}}, "t.positions: unknown task 'positions'; did you mean 'position'"),
        ({"a b": {"task": "position"}}, "t.a b: a label takes letters"),
        ({"position": {"max_token": 1}}, "unknown option t.position.max_token; did you mean"),
        ({"position": {"max_tokens": "x"}}, "t.position.max_tokens"),
        ({"mine": {"task": "position", "max_tokens": -1}}, "t.mine: max_tokens=-1 must be >= 0"),
    ],
)
def test_mistakes_are_one_line(tasks: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        evals.create(tasks, "t")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_task_is_a_file_with_a_headline() -> None:
    folder = Path(evals.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert files == set(TASKS.names())
    for name in ("bits_per_byte", "position"):
        task = evals.create({name: {}}, "t")[name]
        assert task.headline in task.numbers(ITEMS, SCORED)
        assert task.is_better in ("higher", "lower")
