"""Associative recall: what a row binds and asks, and that a table of its pairs answers it all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lm.config import UserError
from lm.data import loader, mqar
from lm.data.batch import Share
from lm.data.mqar import Epochs, Set, Setting

PLAIN = Setting(length=64, pairs=8)
SETTINGS = (
    PLAIN,
    Setting(length=32, pairs=8),  # every other place after the pairs is a query
    Setting(length=64, pairs=8, filler="random"),
    Setting(length=64, pairs=8, repeats=3, power=1.0),
    Setting(length=64, pairs=8, repeats=7, filler="random"),
)
VOCAB = 40


def lookup(tokens: np.ndarray, pairs: int, *, first_wins: bool = False) -> dict[int, int]:
    """Reads the pairs of a row [T] from left to right into key -> value."""
    table: dict[int, int] = {}
    for place in range(0, 2 * pairs, 2):
        key, value = int(tokens[place]), int(tokens[place + 1])
        if not (first_wins and key in table):
            table[key] = value
    return table


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_a_table_of_the_pairs_answers_every_question(setting: Setting) -> None:
    found = mqar.examples(setting, VOCAB, 200, [3])
    for row in range(200):
        table = lookup(found.tokens[row], setting.pairs)
        asked = np.flatnonzero(found.targets[row])
        answers = [table[int(key)] for key in found.tokens[row, asked]]
        assert answers == found.targets[row, asked].tolist()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_layout(setting: Setting) -> None:
    found = mqar.examples(setting, VOCAB, 200, [4])
    half, start = VOCAB // 2, 2 * setting.pairs
    keys, values = found.tokens[:, 0:start:2], found.tokens[:, 1:start:2]
    assert keys.min() >= 1
    assert keys.max() < half <= values.min()
    assert values.max() < VOCAB
    for row in range(200):
        assert len(set(keys[row])) == setting.num_keys
        assert len(set(values[row])) == setting.pairs
        asked = np.flatnonzero(found.targets[row])
        # Each key is asked once, after the pairs, at even distances.
        assert sorted(found.tokens[row, asked]) == sorted(set(keys[row]))
        assert asked.min() >= start
        assert not (asked % 2).any()
        rest = np.setdiff1d(np.arange(start, setting.length), asked)
        blank = setting.filler == "blank"
        assert not blank or not found.tokens[row, rest].any()
        assert (found.tokens[row, found.last[row, asked]] == found.tokens[row, asked]).all()
    if setting.filler == "random":
        assert len(np.unique(found.tokens[:, start + 1 :: 2])) == VOCAB


def test_a_batch_weighs_answers_alone() -> None:
    found = mqar.examples(PLAIN, VOCAB, 5, [0])
    batch = mqar.batch(found)
    assert batch.tokens.shape == batch.targets.shape == (5, 64)
    assert batch.loss_weights.sum(1).tolist() == [8] * 5
    assert ((batch.loss_weights > 0) == (found.targets > 0)).all()
    assert (batch.segment_ids == 1).all()
    assert (batch.positions == np.arange(64)).all()
    # No input gives an answer away: the value asked for never follows the query it answers.
    after = np.roll(batch.tokens, -1, axis=1)
    assert not ((batch.loss_weights > 0) & (after == batch.targets)).any()


def test_rows_are_a_function_of_the_seed() -> None:
    one, two = (mqar.examples(PLAIN, VOCAB, 50, [seed, 1]) for seed in (0, 1))
    again = mqar.examples(PLAIN, VOCAB, 50, [0, 1])
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert (one.tokens != two.tokens).any(axis=1).all()


def test_the_last_value_of_a_key_counts() -> None:
    setting = Setting(length=64, pairs=8, repeats=4)
    found = mqar.examples(setting, VOCAB, 400, [5])
    wrong = total = 0
    for row in range(400):
        early = lookup(found.tokens[row], 8, first_wins=True)
        for place in np.flatnonzero(found.targets[row]):
            differs = early[int(found.tokens[row, place])] != found.targets[row, place]
            assert differs == found.is_repeated[row, place]
            wrong, total = wrong + differs, total + 1
    assert 0.4 < wrong / total < 0.9  # 4 keys share 4 rebindings: 1 - (3 / 4)^4 of them, 0.68


def test_keys_are_uniform_and_queries_follow_the_power_law() -> None:
    setting = Setting(length=32, pairs=1, power=0.5)
    found = mqar.examples(setting, 20, 20_000, [6])
    counts = np.bincount(found.tokens[:, 0], minlength=10)[1:]
    assert np.abs(counts / 20_000 - 1 / 9).max() < 0.01
    gap = (np.argmax(found.targets, axis=1) - 2) // 2
    weight = np.arange(1, 16) ** -0.5
    share = np.bincount(gap, minlength=15) / 20_000
    assert np.abs(share - weight / weight.sum()).max() < 0.012


def test_draws_of_a_row_follow_one_another_without_replacement() -> None:
    """With two questions and three gaps, P(first = 0, second = 1) = p0 p1 / (1 - p0)."""
    setting = Setting(length=10, pairs=2, power=0.01)
    found = mqar.examples(setting, 20, 20_000, [7])
    first = found.tokens[:, [0]] == found.tokens[:, 4:10:2]
    second = found.tokens[:, [2]] == found.tokens[:, 4:10:2]
    p = np.arange(1, 4) ** -0.99
    p /= p.sum()
    share = (first[:, 0] & second[:, 1]).mean()
    assert share == pytest.approx(p[0] * p[1] / (1 - p[0]), abs=0.012)


def test_every_key_of_a_vocabulary_just_large_enough() -> None:
    found = mqar.examples(Setting(length=64, pairs=8), 18, 20, [0])
    assert (np.sort(found.tokens[:, 0:16:2], axis=1) == np.arange(1, 9)).all()


@pytest.mark.parametrize(
    ("setting", "vocab_size", "message"),
    [
        (Setting(length=64, pairs=17), 512, "pairs=17 in length=64.* set length to 68 or more"),
        (Setting(length=65, pairs=4), 512, "pairs=4 in length=65"),
        (Setting(length=64, pairs=0), 512, "pairs=0"),
        (
            Setting(length=64, pairs=8),
            17,
            "17 has 7 keys, a row needs 8 .*vocab_size to 18 or more",
        ),
        (Setting(length=64, pairs=4, repeats=4), 512, "repeats=4 .* below pairs=4"),
        (Setting(length=64, pairs=4, power=0.0), 512, "power=0.0 must be positive"),
    ],
)
def test_mistakes_are_one_line(setting: Setting, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mqar.examples(setting, vocab_size, 4, [0])
    assert "\n" not in str(caught.value)


EPOCHS = Epochs(
    sets=(
        Set(setting=Setting(length=16, pairs=2), examples=64),
        Set(setting=Setting(length=32, pairs=2), examples=20),
    ),
    vocab_size=384,
    batch_size=8,
    seed=0,
)


def test_training_rows_are_epochs_of_whole_sets() -> None:
    found = [EPOCHS.batch(step) for step in range(20)]
    for epoch in (found[:10], found[10:]):
        # 64 rows make eight batches of 8, 20 rows make two; no row comes twice.
        assert sorted(len(batch.tokens[0]) for batch in epoch) == [16] * 8 + [32] * 2
        assert len({row.tobytes() for batch in epoch for row in batch.tokens}) == 80
    lengths = [[len(batch.tokens[0]) for batch in epoch] for epoch in (found[:10], found[10:])]
    assert lengths[0] != lengths[1]
    trained = {row.tobytes() for batch in found for row in batch.tokens}
    for seed in (0, 1):
        test = mqar.examples(EPOCHS.sets[0].setting, EPOCHS.vocab_size, 200, [seed])
        assert not trained & {row.tobytes() for row in test.tokens}


def test_training_rows_are_a_function_of_the_step() -> None:
    """This holds for any first step and any number of ranks, which together read the batch."""
    whole = [EPOCHS.batch(step) for step in range(9, 13)]
    for num_ranks in (1, 2, 4):
        shares = []
        for rank in range(num_ranks):
            share = Share((rank,), num_ranks)
            with loader.generated(EPOCHS, batch_size=8, share=share) as rows:
                rows.set_state({"next_step": 9})
                shares.append(list(itertools.islice(rows, 4)))
                assert rows.state() == {"next_step": 13}
        for step, batch in enumerate(whole):
            for i, field in enumerate(batch):
                together = np.concatenate([share[step][i] for share in shares])
                np.testing.assert_array_equal(together, field)
    with pytest.raises(UserError, match="8 rows is not a multiple of the 3"):
        loader.generated(EPOCHS, batch_size=8, share=Share((0,), 3))
