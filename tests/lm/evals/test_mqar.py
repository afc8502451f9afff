"""The recall task: planted models score on what they know, and vocabularies are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
import pytest

from lm import evals
from lm.config import UserError
from lm.data import tokenizers
from lm.evals import Given, Items, Scored
from lm.evals.mqar import Mqar
from lm.evaluation.scoring import Row, Scorer
from tests.lm import tiny

CONFIG = tiny.config({"data.tokenizer.vocab_size": 320}).data  # the model has ids to spare
GIVEN = Given(tokenizers.create(CONFIG.tokenizer), cast(Any, None), CONFIG, 0)


def planted(items: Items, knows: Callable[[Row, int], bool]) -> list[Scored]:
    """A model whose answer is right where `knows(row, place)` is true."""
    found = []
    for row in items.rows:
        hit = np.array([w > 0 and knows(row, i) for i, w in enumerate(row.weights)])
        found.append(Scored(np.where(row.weights > 0, 1.5, 0.0).astype(np.float32), hit))
    return found


def binding(row: Row, pairs: int, place: int, *, last: bool = True) -> int:
    """The value that follows the last (or first) binding of the key asked at `place`."""
    places = [i for i in range(0, 2 * pairs, 2) if row.tokens[i] == row.tokens[place]]
    return int(row.tokens[places[-1 if last else 0] + 1])


def test_a_lookup_table_scores_all() -> None:
    task = Mqar(pairs=8, rows=40)
    items = task.items(GIVEN)
    numbers = task.numbers(
        items, planted(items, lambda row, i: binding(row, 8, i) == row.targets[i])
    )
    accuracy = numbers["accuracy"]
    assert (accuracy.value, accuracy.num) == (1.0, 40)
    assert accuracy.low == pytest.approx(0.912, abs=1e-3), "forty rows of forty, by Wilson"
    assert accuracy.chance == 1 / 8
    assert accuracy.units is not None
    assert accuracy.units.tolist() == [[8, 8]] * 40
    assert numbers["loss"].value == 1.5
    curve = {name: x for name, x in numbers.items() if name.startswith("accuracy@")}
    # The last pair may be asked two places later, the first 62 places later.
    assert {float(name.partition("@")[2]) for name in curve} <= {2, 4, 8, 16, 32}
    assert all(x.value == 1 for x in curve.values())


def test_a_short_memory_answers_near_questions_alone() -> None:
    task = Mqar(length=128, pairs=16, power=1.0, rows=60)
    items = task.items(GIVEN)

    def near(row: Row, i: int) -> bool:
        return i - int(np.flatnonzero(row.tokens[:32] == row.tokens[i])[-1]) < 32

    numbers = task.numbers(items, planted(items, near))
    assert numbers["accuracy@16"].value == 1
    assert numbers["accuracy@32"].value == 0
    assert numbers["accuracy@64"].value == 0
    assert 0 < numbers["accuracy"].value < 0.5


def test_a_model_that_remembers_the_first_binding() -> None:
    task = Mqar(pairs=8, repeats=4, rows=60)
    items = task.items(GIVEN)
    scored = planted(items, lambda row, i: binding(row, 8, i, last=False) == row.targets[i])
    numbers = task.numbers(items, scored)
    assert numbers["accuracy/once"].value == 1
    assert numbers["accuracy/repeated"].value == 0
    assert not numbers["accuracy"].is_at_chance


def test_a_guess_is_at_chance() -> None:
    """The model guesses one of the row's values at random."""
    task = Mqar(pairs=8, rows=200)
    items = task.items(GIVEN)
    rng = np.random.default_rng(0)
    scored = planted(items, lambda row, i: rng.choice(row.tokens[1:16:2]) == row.targets[i])
    accuracy = task.numbers(items, scored)["accuracy"]
    assert accuracy.low < 1 / 8 < accuracy.high
    assert accuracy.is_at_chance


def test_a_model_is_scored_at_the_answers_alone() -> None:
    built = tiny.create({"model.pattern": "softmax"})
    task = Mqar(length=32, pairs=4, rows=6)
    items = task.items(GIVEN)
    weights = np.stack([row.weights for row in items.rows])
    assert weights.sum() == 6 * 4
    scored = Scorer(built, jax.tree.map(jax.numpy.asarray, tiny.params(built)))(items.rows)
    numbers = task.numbers(items, scored)
    assert numbers["loss"].value > 1
    assert numbers["accuracy"].num == 6


def test_the_vocabulary_is_the_tokenizers_or_one_that_the_model_holds() -> None:
    for vocab_size, top in ((0, 257), (64, 64), (320, 320)):
        tokens = np.stack([x.tokens for x in Mqar(vocab_size=vocab_size).items(GIVEN).rows])
        assert top - 3 < tokens.max() < top
    with pytest.raises(UserError, match="vocab_size=321 is more than the model's 320"):
        Mqar(vocab_size=321).items(GIVEN)
    with pytest.raises(UserError, match="a vocabulary of 257 has 127 keys, a row needs 128"):
        Mqar(length=512, pairs=128).items(GIVEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 20}, r"evaluate\.tasks\.mqar: pairs=20 in length=64"),
        ({"rows": 0}, "rows=0"),
        ({"vocab_size": 9, "pairs": 4}, "a vocabulary of 9 has 3 keys"),
        ({"filler": "noise"}, "filler='noise' is not one of blank, random"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evals.create({"mqar": options}, "evaluate.tasks")
