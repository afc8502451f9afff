"""The passkey in text: the token budget, the text around the key, and the place of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.evals._retrieval import FILLER, PREFIX, occurrences
from lm.evals.needle import Needle
from tests.lm.evals import planted

FEW: dict[str, Any] = {"depths": 5, "seeds": 3}


@pytest.fixture
def books(tmp_path: Path) -> str:
    """Documents of sentences with words and numbers, and a short one, which is left out."""
    rng = np.random.default_rng(0)
    words = ["grass", "moon", "12345", "67890", "the", "was", "of", "naïve"]
    sentences = lambda n: " ".join(" ".join(rng.choice(words, 6)) + "." for _ in range(n))
    texts = ["short.", sentences(60), sentences(90)]
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize(("kind", "lengths"), [("bytes", (257, 700)), ("bpe", (97, 257, 512))])
def test_prompts(books: str, kind: str, lengths: tuple[int, ...]) -> None:
    tokenizer = planted.tokenizer(kind)
    items = Needle(path=books, lengths=lengths, **FEW).items(planted.given(64, kind))
    texts = [json.loads(line)["text"].encode() for line in Path(books).read_text().splitlines()]
    reach = len(tokenizer.encode(FILLER))
    stops = 0
    for item, row, wrong in zip(items.about, items.rows[::2], items.rows[1::2], strict=True):
        assert len(planted.ids(row)) == len(planted.ids(wrong)) == item.length
        prompt = planted.prompt(row)
        assert occurrences(prompt, planted.answer(row)) == 2
        assert occurrences(prompt, planted.answer(wrong)) == 0
        before, after = planted.around(row, tokenizer)
        size = len(before) + len(after)
        hay = b"".join(_bytes(tokenizer, part) for part in (before, after))
        assert any(hay in text for text in texts[1:]), "the text around the key is contiguous"
        assert abs(len(before) - item.depth * size) <= reach
        stops += _bytes(tokenizer, before).endswith(b".")
    assert stops > len(items.about) // 2, "the key is mostly between sentences"


def _bytes(tokenizer: Any, part: np.ndarray) -> bytes:
    return tokenizer._codec.decode_bytes(part.tolist())


def test_depths_are_compared_in_the_same_text(books: str) -> None:
    items = Needle(path=books, lengths=(400,), **FEW).items(planted.given(64))
    text = planted.tokenizer("bytes").decode
    starts = {}
    for i, item in enumerate(items.about):
        if item.depth == 1:
            starts[i % 3] = text(planted.ids(items.rows[2 * i])).partition(PREFIX)[2][:40]
    for i, item in enumerate(items.about):
        if item.depth > 0.5:
            assert starts[i % 3] in text(planted.ids(items.rows[2 * i]))
    assert len(set(starts.values())) == 3


def test_planted_models(books: str) -> None:
    asked = Needle(path=books, lengths=(400,), **FEW)
    items = asked.items(planted.given(64))
    perfect = asked.numbers(items, planted.copier(items.rows))
    assert perfect["exact"].value == 1.0
    assert not perfect["exact@400"].is_at_chance
    nothing = asked.numbers(items, planted.uniform(items.rows, 257))
    assert nothing["exact@400"].is_at_chance
    assert nothing["gap@400"].is_at_chance


def test_refusals(books: str) -> None:
    with pytest.raises(
        UserError, match=r"has the 9,000 tokens of a window, the longest has \d,\d+"
    ):
        Needle(path=books, lengths=(9000,), **FEW).items(planted.given(64))
    with pytest.raises(UserError, match=r"^path='nowhere/\*.txt' matches no file"):
        Needle(path="nowhere/*.txt", lengths=(400,), **FEW).items(planted.given(64))
