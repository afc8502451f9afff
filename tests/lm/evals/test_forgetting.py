"""The forgetting curve of a copier, of a model that knows nothing, and of one that forgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import UserError
from lm.evals import create
from lm.evals.forgetting import Forgetting
from lm.evaluation.scoring import Row, Scored
from tests.lm.evals import planted

SEGMENT = 12


@pytest.fixture
def books(tmp_path: Path) -> str:
    return planted.write_books(tmp_path / "books.jsonl", [400, 50, 900])


def task(books: str, **changes: Any) -> Forgetting:
    options: dict[str, Any] = {"segment": SEGMENT, "gaps": (0, 17, 97), "max_items": 5}
    found = Forgetting(path=books, **(options | changes))
    assert found.problem() is None
    return found


def test_rows(books: str) -> None:
    """The second copy ends the row, a gap after the first. The control row replaces the first copy;
    every other token and place is the same.
    """
    items = task(books).items(planted.given(64))
    assert items.about.unit.tolist() == [0, 0, 1, 1, 1]
    text = Path(books).read_text()
    tokenizer = planted.tokenizer("bytes")
    rows = iter(items.rows)
    for _ in range(5):
        same: list[Any] = []
        for gap in (0, 17, 97):
            pair = next(rows), next(rows)
            copy, lm = (planted.ids(row) for row in pair)
            assert len(copy) == 2 * SEGMENT + gap
            np.testing.assert_array_equal(copy[:SEGMENT], copy[-SEGMENT:])
            np.testing.assert_array_equal(copy[SEGMENT:], lm[SEGMENT:])
            assert tokenizer.decode(copy[:-SEGMENT]) in text
            assert tokenizer.decode(lm[:SEGMENT]) in text
            assert tokenizer.decode(lm[:SEGMENT]) not in tokenizer.decode(copy)
            for row in pair:
                np.testing.assert_array_equal(row.targets[row.weights > 0], copy[1 - SEGMENT :])
            same.append((copy[:SEGMENT].tolist(), lm[:SEGMENT].tolist()))
        assert same[0] == same[1] == same[2], "gaps are compared on the same tokens"


def test_planted_models(books: str) -> None:
    asked = task(books)
    items = asked.items(planted.given(64))
    perfect = asked.numbers(items, planted.copier(items.rows))
    for at in ("", "@0", "@17", "@97"):
        copy, lm = perfect[f"copy{at}"], perfect[f"lm{at}"]
        assert (copy.value, copy.num, copy.chance) == (1.0, 2, lm.value)
        assert lm.value < 0.3
        assert not copy.is_at_chance
    nothing = asked.numbers(items, planted.uniform(items.rows, 257))
    assert nothing["copy"].value == nothing["lm"].value == 0
    assert all(x.is_at_chance for name, x in nothing.items() if name.startswith("copy"))


def test_a_short_memory_shows_at_its_gap(books: str) -> None:
    """The model hits wherever the token 29 places before the target equals it, and nowhere else."""

    def recent(rows: Sequence[Row]) -> list[Scored]:
        found = []
        for row in rows:
            before = np.append(np.full(28, -1), row.tokens)[: len(row.tokens)]
            hit = (row.weights > 0) & (before == row.targets)
            found.append(Scored(np.zeros(len(hit), np.float32), hit))
        return found

    asked = task(books)
    items = asked.items(planted.given(64))
    found = asked.numbers(items, recent(items.rows))
    assert found["copy@17"].value == 1.0
    assert max(found["copy@0"].value, found["copy@97"].value, found["lm@17"].value) < 0.2
    mean = np.mean([found[f"copy@{gap}"].value for gap in (0, 17, 97)])
    assert found["copy"].value == pytest.approx(mean)
    assert found["copy"].units is not None
    assert len(found["copy"].units) == 2


def test_default_gaps_fit_the_context(books: str) -> None:
    for context, gaps in ((40, (16,)), (56, (16, 32)), (55, (16, 32)), (54, (16,))):
        items = task(books, gaps=()).items(planted.given(context))
        assert items.about.gaps == gaps
        assert max(len(row.tokens) for row in items.rows) <= context
    with pytest.raises(UserError, match=r"segment=12 twice and a gap of 16 .* of 38;"):
        task(books, gaps=()).items(planted.given(38))


def test_refusals(books: str) -> None:
    with pytest.raises(UserError, match=r"has the 1,024 tokens of a window, the longest has 900"):
        task(books, gaps=(1000,)).items(planted.given(64))
    table: dict[str, dict[str, Any]] = {
        "segment=1 must be >= 2": {"segment": 1},
        "max_items=0": {"max_items": 0},
        "gaps holds -1": {"gaps": [16, -1]},
        "holds a gap twice": {"gaps": [16, 16]},
    }
    for words, options in table.items():
        with pytest.raises(UserError, match=words):
            create({"forgetting": options}, "tasks")
