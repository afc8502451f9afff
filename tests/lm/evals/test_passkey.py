"""Prompts of exact length with the key at its place, for several tokenizers and lengths."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.evals import Items, create
from lm.evals._retrieval import FILLER, PREFIX, occurrences
from lm.evals.passkey import Passkey
from lm.evaluation.scoring import Scored
from tests.lm.evals import planted

FEW: dict[str, Any] = {"depths": 4, "seeds": 3}


@pytest.mark.parametrize(
    ("kind", "shots", "lengths"),
    [
        ("bytes", 0, (257, 300, 512, 1000, 2048)),
        ("bytes", 1, (450, 1024)),
        ("bpe", 0, (97, 128, 257, 1000)),
        ("bpe", 1, (128, 257)),
    ],
)
def test_prompts(kind: str, shots: int, lengths: tuple[int, ...]) -> None:
    tokenizer = planted.tokenizer(kind)
    items = Passkey(lengths=lengths, shots=shots, **FEW).items(planted.given(64, kind))
    filler = tokenizer.encode(FILLER)
    seen: set[str] = set()
    pairs = zip(items.rows[::2], items.rows[1::2], strict=True)
    wanted = itertools.product(lengths, np.linspace(0, 1, 4), range(3))
    for item, (right, wrong), want in zip(items.about, pairs, wanted, strict=True):
        length, depth, _ = want
        assert (item.length, item.depth) == (length, depth)
        assert len(planted.ids(right)) == len(planted.ids(wrong)) == length
        np.testing.assert_array_equal(planted.prompt(right), planted.prompt(wrong))
        key, other = planted.answer(right), planted.answer(wrong)
        assert len(key) == len(other) == item.size
        assert occurrences(planted.prompt(right), key) == 2
        assert occurrences(planted.prompt(right), other) == 0
        text, digits = tokenizer.decode(planted.prompt(right)), tokenizer.decode(key)
        assert len(digits) == 6
        assert digits[1:].isdigit()
        assert digits != tokenizer.decode(other)
        seen.add(digits)
        said = f" The pass key is{digits}. Remember it.{digits} is the pass key."
        before, after = text.split(said)
        assert after.endswith(" What is the pass key? The pass key is")
        assert before.count(" What is the pass key? The pass key is ") == shots
        assert before.count(PREFIX) == 1
        # The filler is around the key, cut only at its start; the key is near its place.
        before, after = planted.around(right, tokenizer)
        hay = tokenizer.decode(before), tokenizer.decode(after)
        assert (FILLER * 100).endswith("".join(hay))
        assert hay[1] == FILLER * hay[1].count(FILLER)
        assert abs(len(before) - depth * (len(before) + len(after))) <= len(filler)
    assert len(seen) > len(items.about) // 2


def test_a_key_does_not_depend_on_what_else_is_asked() -> None:
    few = Passkey(lengths=(300,), **FEW).items(planted.given(64))
    more = Passkey(lengths=(512, 300), **FEW).items(planted.given(64))
    for a, b in zip(few.rows, more.rows[len(few.rows) :], strict=True):
        np.testing.assert_array_equal(planted.ids(a), planted.ids(b))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_planted_models(kind: str) -> None:
    asked = Passkey(lengths=(300, 512), **FEW)
    items = asked.items(planted.given(64, kind))
    perfect = asked.numbers(items, planted.copier(items.rows))
    depths = [name for name in perfect if name.startswith("exact_at_depth@")]
    assert depths == [f"exact_at_depth@{x}" for x in ("0", "0.333", "0.667", "1")]
    for name in ("exact", "exact@300", "exact@512", *depths):
        assert perfect[name].value == 1.0, name
        assert not perfect[name].is_at_chance
    assert (perfect["exact"].num, perfect["exact@300"].num, perfect[depths[0]].num) == (24, 12, 6)
    assert perfect["logprob@300"].value == pytest.approx(np.log(0.9), rel=1e-5)
    assert perfect["gap@512"].low > 1
    assert not perfect["gap"].is_at_chance
    nothing = asked.numbers(items, planted.uniform(items.rows, 400))
    assert nothing["exact"].value == 0
    assert nothing["exact"].chance == 1e-5
    assert nothing["logprob@300"].value == pytest.approx(-np.log(400), rel=1e-6)
    assert nothing["gap"].value == 0
    assert all(x.is_at_chance for name, x in nothing.items() if x.chance is not None)


def test_all_digits_must_be_right() -> None:
    """A key with one wrong digit is wrong; the gap of a model that guesses is 0 on average."""
    asked = Passkey(lengths=(300,), depths=5, seeds=10)
    items = asked.items(planted.given(64))
    almost = planted.copier(items.rows)
    for one, row in zip(almost, items.rows, strict=True):
        one.hit[np.flatnonzero(row.weights)[3]] = False
    assert asked.numbers(items, almost)["exact"].value == 0
    rng = np.random.default_rng(0)
    guesses = [
        Scored((rng.exponential(2, len(r.tokens)) * r.weights).astype(np.float32), r.weights < 0)
        for r in items.rows
    ]
    assert asked.numbers(items, guesses)["gap"].is_at_chance


def test_default_lengths_and_refusals() -> None:
    lengths = lambda items: sorted({item.length for item in items.about})
    one: dict[str, Any] = {"depths": 2, "seeds": 1}
    assert lengths(Passkey(**one).items(planted.given(1000))) == [256, 512, 1000]
    assert lengths(Passkey(**one).items(planted.given(512, "bpe"))) == [128, 256, 512]
    with pytest.raises(
        UserError, match=r"takes \d+ tokens of this tokenizer and .* 97; set lengths"
    ):
        Passkey(**one).items(planted.given(97))
    with pytest.raises(UserError, match=r"lengths holds 97 and the question alone takes 2\d\d"):
        Passkey(lengths=(97, 512), **one).items(planted.given(512))
    table: dict[str, dict[str, Any]] = {
        "depths=1 must be >= 2": {"depths": 1},
        "seeds=0": {"seeds": 0},
        "shots=2 must be 0 or 1": {"shots": 2},
        "lengths holds 0": {"lengths": [0]},
        "holds a length twice": {"lengths": [512, 512]},
    }
    for words, options in table.items():
        with pytest.raises(UserError, match=words):
            create({"passkey": options}, "tasks")


def test_rows_share_what_is_alike() -> None:
    items: Items = Passkey(lengths=(512,), **FEW).items(planted.given(64))
    assert len({id(row.positions) for row in items.rows}) == 1
