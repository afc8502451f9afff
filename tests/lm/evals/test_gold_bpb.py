"""Bits of the right answer over its bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.evals import create
from lm.evals.gold_bpb import GoldBpb
from lm.evaluation import statistics
from tests.lm.evals import asked, planted

GIVEN = planted.given(64)
ANSWERS = [" yes", " no, never", " 12 é", "\n    return x\n"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Writes documents of one choice each, with arbitrary labels."""
    labels: list[Any] = [None, "no", ["12"], 0]
    found = zip(ANSWERS, labels, strict=True)
    return asked.write(
        tmp_path / "a.jsonl.gz",
        [
            asked.request(i, 0, f"Question {i}:", text, label)
            for i, (text, label) in enumerate(found)
        ],
    )


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bpb_agrees_with_sums_by_hand(path: str, kind: str) -> None:
    question = GoldBpb(path=path)
    given = planted.given(64, kind)
    items = question.items(given)
    texts = [given.tokenizer.decode(planted.answer(row)) for row in items.rows]
    assert texts == ANSWERS
    sizes = np.array([len(text.encode()) for text in ANSWERS])
    tokens = np.array([row.weights.sum() for row in items.rows])
    rates = np.array([0.5, 2.0, 1.0, 3.0])
    scored = asked.totals(items.rows, rates * tokens)
    found = question.numbers(items, scored)
    nats = (rates * tokens).sum()
    assert found["bpb"].value == pytest.approx(nats / math.log(2) / sizes.sum(), rel=1e-6)
    assert found["loss"].value == pytest.approx(nats / tokens.sum(), rel=1e-6)
    assert found["bpb"].num == 4
    assert found["bpb"].low < found["bpb"].value < found["bpb"].high


def test_uniform_bytes_are_eight_bits(path: str) -> None:
    question = GoldBpb(path=path)
    items = question.items(GIVEN)
    found = question.numbers(items, planted.uniform(items.rows, 256))["bpb"]
    assert (found.value, found.low, found.high) == pytest.approx((8, 8, 8), abs=1e-6)


def test_models_are_compared_document_by_document(tmp_path: Path) -> None:
    """A difference of 0.1 bits per byte is significant although documents differ ten
    times as much.
    """
    path = asked.write(tmp_path / "a.jsonl", asked.questions(60))
    question = GoldBpb(path=path, max_items=40)
    items = question.items(GIVEN)
    rates = np.random.default_rng(0).uniform(0.5, 2.5, 40)
    numbers = []
    for extra in (0.0, 0.1):
        tokens = np.array([row.weights.sum() for row in items.rows])
        scored = asked.totals(items.rows, (rates + extra * math.log(2)) * tokens)
        numbers.append(question.numbers(items, scored)["bpb"])
    better, worse = numbers
    assert better.high > worse.low
    found = statistics.difference(worse, better)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-3)
    assert not found.is_at_chance


def test_the_gold_choice_of_several_is_scored(tmp_path: Path) -> None:
    lines = asked.questions(9, choices=(4, 3), bare=True)
    items = GoldBpb(path=asked.write(tmp_path / "a.jsonl", lines)).items(GIVEN)
    decode = planted.tokenizer("bytes").decode
    gold = [
        line["request"]["context"] + line["request"]["continuation"]
        for line in lines
        if line["idx"] == line["label"] and line["doc_id"] < asked.BARE
    ]
    assert [decode(planted.ids(row)) for row in items.rows] == gold


def test_refusals(tmp_path: Path) -> None:
    broken = [asked.request(0, i, "c", " d", "x") for i in range(2)]
    with pytest.raises(UserError, match=r"a.jsonl:1: label='x' is not one of idx \[0, 1\]"):
        GoldBpb(path=asked.write(tmp_path / "a.jsonl", broken)).items(GIVEN)
    with pytest.raises(UserError, match="path is empty"):
        create({"gold_bpb": {}}, "tasks")
    with pytest.raises(UserError, match=r"unknown option tasks.gold_bpb.normalization"):
        create({"gold_bpb": {"path": "x", "normalization": "pmi"}}, "tasks")


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("codex_humaneval_gold_bpb_0shot", 164),
        ("gsm8k_gold_bpb_5shot", 1319),
        ("lambada_bpb_0shot", 5153),
    ],
)
def test_the_real_files_are_read(name: str, documents: int) -> None:
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "requests" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    question = GoldBpb(path=str(path), max_len=4096)
    items = question.items(GIVEN)
    found = question.numbers(items, planted.uniform(items.rows, 256))["bpb"]
    assert found.num == documents
    assert found.value == pytest.approx(8, abs=1e-6)
