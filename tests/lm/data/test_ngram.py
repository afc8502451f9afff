"""Counts and probabilities agree with sums done by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm.data import ngram

END, VOCAB = 4, 5


def test_counts_agree_with_sums_by_hand() -> None:
    """The parts are a b a c END b a END, and a d. END begins no pair; no pair spans two parts."""
    found = ngram.count([np.array([0, 1, 0, 2, END, 1, 0, END]), np.array([0, 3])], VOCAB, END)
    assert found.counts.tolist() == [4, 2, 1, 1, 2]
    p = np.array([5, 3, 2, 2, 3]) / 15
    np.testing.assert_allclose(np.exp(-found.unigram(np.arange(VOCAB))), p)
    # b, c, END, d follow a once each, a follows b twice, END follows c, nothing follows d or END.
    given_a = np.exp(-np.array([found.bigram(np.array([0, b]))[1] for b in range(VOCAB)]))
    np.testing.assert_allclose(given_a, (np.array([0, 1, 1, 1, 1]) + 4 * p) / 8)
    given_b = np.exp(-np.array([found.bigram(np.array([1, b]))[1] for b in range(VOCAB)]))
    np.testing.assert_allclose(given_b, (np.array([2, 0, 0, 0, 0]) + p) / 3)
    for a in (3, END):
        given = np.exp(-np.array([found.bigram(np.array([a, b]))[1] for b in range(VOCAB)]))
        np.testing.assert_allclose(given, p)
    np.testing.assert_allclose(np.exp(-found.bigram(np.array([1]))), p[1:2])


def test_each_distribution_sums_to_one() -> None:
    ids = np.random.default_rng(0).zipf(1.5, 5000) % 40
    found = ngram.count([ids], 40, 39)
    assert np.exp(-found.unigram(np.arange(40))).sum() == pytest.approx(1)
    for a in range(40):
        nats = [found.bigram(np.array([a, b]))[1] for b in range(40)]
        assert np.exp(-np.array(nats)).sum() == pytest.approx(1)


def test_a_corpus_is_likelier_by_its_bigrams() -> None:
    """A chain that steps by one costs almost nothing per step; its unigrams say nothing."""
    ids = np.arange(3000) % 30
    found = ngram.count([ids], 31, 30)
    assert found.unigram(ids).mean() == pytest.approx(np.log(30), rel=0.02)
    assert found.bigram(ids)[1:].mean() < 0.05


def test_training_tokens_are_shared_out_by_weight() -> None:
    tokens = {"a": np.full(900, 1), "b": np.full(900, 2), "held out": np.full(900, 3)}
    stores: Any = {name: {"train": SimpleNamespace(tokens=x)} for name, x in tokens.items()}
    weights = {"a": 3.0, "b": 1.0, "held out": 0.0}
    found = ngram.of_training(stores, weights, 400, VOCAB, END)
    assert found.counts.tolist() == [0, 300, 100, 0, 0]
    whole = ngram.of_training(stores, weights, 10**6, VOCAB, END)
    assert whole.counts.tolist() == [0, 900, 900, 0, 0]
