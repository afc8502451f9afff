"""The last word: where it is cut, and what counts as guessed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lm.config import UserError
from lm.evals.lambada import Lambada
from lm.evaluation.scoring import Scored
from tests.lm.evals import asked, planted

GIVEN = planted.given(64)
TEXTS = {
    "Give me a minute, Shane": " Shane",
    "was some kind of\n\nPower": " of\n\nPower",
    "and saw the \n\nrecorder": " \n\nrecorder",
    "twice  spaced": "  spaced",
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return asked.write(tmp_path / "a.jsonl.gz", [{"text": text} for text in TEXTS])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_last_word(path: str, kind: str) -> None:
    given = planted.given(64, kind)
    items = Lambada(path=path).items(given)
    decode = given.tokenizer.decode
    assert [decode(planted.answer(row)) for row in items.rows] == list(TEXTS.values())
    assert [decode(planted.ids(row)) for row in items.rows] == list(TEXTS)


def test_numbers(path: str) -> None:
    """A word with one token that is not the likeliest is wrong; tokens outside the word do not
    count.
    """
    question = Lambada(path=path)
    items = question.items(GIVEN)
    nats = np.array([1.0, 2.0, 3.0, 6.0])
    scored = []
    for i, row in enumerate(items.rows):
        used = row.weights > 0
        hit = used.copy()
        hit[np.flatnonzero(used)[2]] = i != 1
        scored.append(Scored((row.weights * nats[i] / used.sum()).astype(np.float32), hit))
    found = question.numbers(items, scored)
    assert found["accuracy"].value == 3 / 4
    assert found["accuracy"].chance is None
    assert found["perplexity"].value == pytest.approx(math.exp(3.0), rel=1e-5)
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high
    size = sum(len(word.encode()) for word in TEXTS.values())
    assert found["bpb"].value == pytest.approx(12 / math.log(2) / size, rel=1e-5)
    uniform = question.numbers(items, planted.uniform(items.rows, 256))
    assert uniform["bpb"].value == pytest.approx(8, abs=1e-6)
    assert uniform["accuracy"].value == 0


def test_a_hopeless_model_has_a_finite_perplexity(path: str) -> None:
    question = Lambada(path=path)
    items = question.items(GIVEN)
    found = question.numbers(items, asked.constant(items.rows, nats=1e4))
    assert math.isfinite(found["perplexity"].high)


def test_refusals(tmp_path: Path) -> None:
    for text in ("word", "ends with a space ", " word", ""):
        path = asked.write(tmp_path / "a.jsonl", [{"text": "a fine line"}, {"text": text}])
        with pytest.raises(UserError, match=r"a.jsonl:2: no word follows the last space"):
            Lambada(path=path).items(GIVEN)
    path = asked.write(tmp_path / "b.jsonl", [{"txt": "a b"}])
    with pytest.raises(UserError, match=r"b.jsonl:1 has no key 'text'; did you mean 'txt'"):
        Lambada(path=path).items(GIVEN)


def test_the_real_file_is_read() -> None:
    path = Path(__file__).resolve().parents[4] / "shared" / "data/lambada/lambada_test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    assert len(Lambada(path=str(path), max_len=2048).items(GIVEN).rows) == 5153
