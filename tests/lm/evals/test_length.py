"""The length task against sums over planted losses, one for each token of the document."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm.config import UserError
from lm.data import prepare
from lm.evals import Items, Number, create
from lm.evals.length import Length
from lm.evaluation import statistics
from lm.evaluation.scoring import Row, Scored, Scorer
from tests.lm import tiny
from tests.lm.evals import planted

OPTIONS: dict[str, Any] = {"max_len": 64, "shortest": 8, "targets": 4, "train_len": 16}


@pytest.fixture
def books(tmp_path: Path) -> str:
    return planted.write_books(tmp_path / "books.jsonl", [200, 30, 700, 65, 64])


def task(books: str, **changes: Any) -> Length:
    found = Length(path=books, **(OPTIONS | changes))
    assert found.problem() is None
    return found


def scored(items: Items, nll: Callable[[Row], np.ndarray]) -> list[Scored]:
    return [
        Scored(nll(row).astype(np.float32), np.zeros(len(row.tokens), bool)) for row in items.rows
    ]


def test_every_protocol_reads_the_same_targets_once(books: str) -> None:
    """At every length the rows of a window join to the window, without a gap or an overlap. The row
    of protocol B is the end of the window, and no row is scored twice.
    """
    asked = task(books)
    items = asked.items(planted.given(16))
    by_length: dict[tuple[int, int], list[Row]] = {}
    for (w, length, _), row in zip(items.about.pieces, items.rows, strict=True):
        assert len(row.tokens) == length
        assert np.all(row.weights == 1)
        by_length.setdefault((w, length), []).append(row)
    for w in range(len(items.about.unit)):
        (whole,) = by_length[w, 64]
        for length in (8, 16, 32):
            rows = by_length[w, length]
            assert len(rows) == 64 // length
            np.testing.assert_array_equal(np.concatenate([r.tokens for r in rows]), whole.tokens)
            np.testing.assert_array_equal(np.concatenate([r.targets for r in rows]), whole.targets)
    assert len(items.about.pieces) == len(set(map(id, items.rows)))
    only_b = task(books, protocols=("B",)).items(planted.given(16))
    ends = {
        length: row.targets[-4:]
        for (_, length, _), row in zip(only_b.about.pieces, only_b.rows, strict=True)
    }
    assert len(only_b.rows) == 4 * len(items.about.unit)
    assert all(np.array_equal(end, ends[64]) for end in ends.values())


def test_windows_stay_in_their_document(books: str) -> None:
    """Documents of 200, 700 and 65 letters have windows of 65 tokens; those of 30 and 64
    have none.
    """
    items = task(books).items(planted.given(16))
    assert items.about.unit.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    ids = planted.tokenizer("bytes")
    texts = [line[10:-2] for line in Path(books).read_text().splitlines()]
    kept = [text for text in texts if len(text) >= 65]
    spans: list[tuple[int, int]] = []
    for (w, length, _), row in zip(items.about.pieces, items.rows, strict=True):
        if length == 64:
            text = ids.decode([*row.tokens, row.targets[-1]])
            unit = int(items.about.unit[w])
            assert kept[unit].count(text) == 1
            spans.append((unit, kept[unit].index(text)))
    assert all(b[1] - a[1] >= 65 for a, b in itertools.pairwise(spans) if a[0] == b[0])
    few = task(books, max_windows=2).items(planted.given(16))
    assert few.about.unit.tolist() == [0, 1]
    five = task(books, max_windows=5).items(planted.given(16))
    assert np.bincount(five.about.unit).tolist() == [2, 2, 1]


def test_numbers_are_the_sums(books: str) -> None:
    """With nll = target id / 100 + sqrt(tokens read), every protocol agrees with sums by hand."""
    asked = task(books)
    items = asked.items(planted.given(16))
    found = asked.numbers(items, scored(items, lambda r: r.targets / 100 + np.sqrt(r.positions)))
    whole = [row for (_, n, _), row in zip(items.about.pieces, items.rows, strict=True) if n == 64]
    targets = np.stack([row.targets for row in whole]) / 100
    for length in (8, 16, 32, 64):
        read = np.sqrt(np.arange(64) % length)
        want = (targets + read).mean()
        assert found[f"window@{length}"].value == pytest.approx(want, rel=1e-6)
        bits = want / math.log(2)  # a token is a byte
        assert found[f"window_bpb@{length}"].value == pytest.approx(bits, rel=1e-6)
        end = targets[:, -4:] + np.sqrt(np.arange(length - 4, length))
        assert found[f"context@{length - 4}"].value == pytest.approx(end.mean(), rel=1e-6)
    gain = np.mean(np.sqrt(np.arange(60, 64)) - np.sqrt(np.arange(12, 16)))
    assert found["gain"].value == pytest.approx(gain, rel=1e-5)
    # The tail of A's whole window is B at the longest context; the parts of C join to A's window.
    read = targets + np.sqrt(np.arange(64))
    assert found["context@60"].value == pytest.approx(read[:, -4:].mean(), rel=1e-6)
    positions = {int(n[9:]): x for n, x in found.items() if n.startswith("position@")}
    ends = [*list(positions)[1:], 65]
    for (first, number), end in zip(positions.items(), ends, strict=True):
        assert number.value == pytest.approx(read[:, first - 1 : end - 1].mean(), rel=1e-6)
        assert number.units is None
    sizes = np.subtract(ends, list(positions))
    total = sum(size * x.value for size, x in zip(sizes, positions.values(), strict=True))
    assert total / 64 == pytest.approx(found["window@64"].value, rel=1e-6)
    octaves = [[n for n in positions if 2**k <= n < 2 ** (k + 1)] for k in range(7)]
    assert [len(octave) for octave in octaves] == [1, 2, 4, 8, 8, 8, 0]


def test_gain_is_the_paired_difference_over_documents(books: str) -> None:
    """It equals statistics.difference of the two columns, and can be compared between models."""
    asked = task(books)
    items = asked.items(planted.given(16))
    rng = np.random.default_rng(0)
    found = asked.numbers(items, scored(items, lambda r: rng.random(len(r.tokens))))
    want = statistics.difference(found["context@60"], found["context@12"])
    gain = found["gain"]
    for a, b in ((gain.value, want.value), (gain.low, want.low), (gain.high, want.high)):
        assert a == pytest.approx(b, abs=1e-12)
    assert gain.num == 3
    worse = asked.numbers(items, scored(items, lambda r: r.positions / 10))["gain"]
    assert worse.low > 0.1
    assert statistics.difference(worse, gain).low > 0
    assert Number.from_mapping(gain.to_mapping()) == gain


def test_a_uniform_model(books: str) -> None:
    """Through the scorer, a model whose logits are all 0 loses log(vocabulary) at every token."""
    built = tiny.create({"data.context_length": 16})
    built = dataclasses.replace(built, score=tiny.jit(built.score.__wrapped__))  # pyright: ignore[reportFunctionMemberAccess]
    zero = jax.tree.map(np.zeros_like, tiny.params(built))
    asked = task(books, shortest=32, targets=8, max_windows=3)
    items = asked.items(planted.given(16))
    found = asked.numbers(items, Scorer(built, zero)(items.rows))
    for name, number in found.items():
        if not name.startswith(("gain", "window_bpb")):
            assert number.value == pytest.approx(math.log(tiny.VOCAB), rel=1e-6), name
    bits = math.log2(tiny.VOCAB)
    assert found["window_bpb@32"].value == pytest.approx(bits, rel=1e-6)
    gain = found["gain"]
    assert gain.value == pytest.approx(0, abs=1e-5)
    assert gain.low <= 0 <= gain.high


def test_documents_left_out_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planted.write_books(tmp_path / "books.jsonl", [200, 90])
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with open(tmp_path / "books.jsonl", "ab") as file:
        file.write(b'{"text": "\xff"}\n{"text": ""}\n')
    asked = task(str(tmp_path / "*.jsonl"))
    assert asked.items(planted.given(16)).rows
    (line,) = caplog.messages
    for words in ("2 documents; left out: 1 broken link (first ", "1 undecodable", "1 empty"):
        assert words in line


def test_validation_documents_of_the_run(tmp_path: Path) -> None:
    """path "" reads the held-out documents of every set and no others, without their end of text:
    otherwise the document of 64 letters would have a window.
    """
    planted.write_books(tmp_path / "a.jsonl", [150] * 12)
    planted.write_books(tmp_path / "b.jsonl", [65, 64, 90], seed=1)
    plain = {"text_key": "text", "weight": 1.0, "valid_fraction": 0.4}
    sources = {
        "a": plain | {"path": str(tmp_path / "a.jsonl")},
        "b": plain | {"path": str(tmp_path / "b.jsonl"), "weight": 0.0, "valid_fraction": 1.0},
    }
    data = tiny.config({"data.sources": sources}).data
    tokenizer = planted.tokenizer("bytes")
    prepared = prepare.prepare(data, tmp_path / "data", progress=False, tokenizer=tokenizer)
    given = planted.given(16, prepared=prepared, data=data)
    items = task("", protocols=("B",)).items(given)
    valid = prepared.stores["a"]["valid"]
    num = valid.num_documents
    assert 0 < num < 12
    assert np.bincount(items.about.unit).tolist() == [2] * num + [1, 1]
    assert all(row.targets.max() < tokenizer.end_of_text for row in items.rows)
    held_out = valid.tokens[:].astype("<u2").tobytes()
    for (w, length, _), row in zip(items.about.pieces, items.rows, strict=True):
        if length == 64 and items.about.unit[w] < num:
            assert row.tokens.astype("<u2").tobytes() in held_out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_len": 256, "shortest": 512}, "max_len=256 must be at least twice shortest=512"),
        ({"max_len": 3000}, "shortest=512 times a power of two; the nearest below is 2048"),
        ({"targets": 4096}, "targets=4096 must lie in 0..2048"),
        ({"protocols": ["B", "D"]}, "'D'; known: A, B, C"),
        ({"protocols": ["A", "C"]}, "lacks B"),
        ({"max_windows": 0}, "max_windows=0 must be >= 1"),
        ({"train_len": -1}, "train_len=-1"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        create({"length": options}, "tasks")


def test_refusals_name_both_values(books: str, tmp_path: Path) -> None:
    longer = task(books, max_len=1024)
    with pytest.raises(UserError, match=r"has the 1,025 tokens of a window, the longest has 700"):
        longer.items(planted.given(16))
    with pytest.raises(UserError, match="max_len=64 is the row nearest the training length 512"):
        task(books, train_len=0, targets=0).items(planted.given(512))
    with pytest.raises(UserError, match=r"^path='.*none.jsonl' matches no file; set a path"):
        task(str(tmp_path / "none.jsonl")).items(planted.given(16))
    with pytest.raises(UserError, match=r"no key 'body' \(text_key\); known: text"):
        task(books, text_key="body").items(planted.given(16))
