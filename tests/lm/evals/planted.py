"""Tokenizers, documents and stand-in models for the tests of the long-context tasks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import TokenizerConfig
from lm.data import tokenizers
from lm.data.tokenizers import Tokenizer
from lm.evals import Given
from lm.evals._retrieval import FILLER, PREFIX
from lm.evaluation.scoring import Row, Scored
from tests.lm import tiny

TEXT = f"{PREFIX}{FILLER} What is the pass key? The pass key is. Remember it. 12 34 56 78 90 1234"


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """`bytes`, or `bpe`: trained here, it knows the words of the passkey and merges digits."""
    size = {"bytes": 257, "bpe": 400}[kind]
    config = TokenizerConfig(
        kind=kind, path="", vocab_size=size, pattern="gpt2", end_of_text="", bos=""
    )  # pyright: ignore[reportArgumentType]
    return tokenizers.create(config, [TEXT] * 4)


def given(context: int, kind: str = "bytes", prepared: Any = None, data: Any = None) -> Given:
    config = data or tiny.config({"data.context_length": context}).data
    return Given(tokenizer(kind), prepared, config, max_tokens=1)


def write_books(path: Path, sizes: Sequence[int], seed: int = 0) -> str:
    """Writes JSON lines: documents of `sizes` random letters, in which a letter pair
    seldom recurs.
    """
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!?;:,. "))
    lines = [json.dumps({"text": "".join(rng.choice(letters, size))}) for size in sizes]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def ids(row: Row) -> np.ndarray:
    return np.append(row.tokens, row.targets[-1])


def answer(row: Row) -> np.ndarray:
    """The scored tokens, at the end of the row."""
    return row.targets[row.weights > 0]


def prompt(row: Row) -> np.ndarray:
    return ids(row)[: -len(answer(row))]


def around(row: Row, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens between the opening and the statement of the key, and those from the statement to
    the question. An opening or a statement that is missing or repeated fails here.
    """
    key, found = answer(row).tolist(), prompt(row).tolist()
    encode = tokenizer.encode
    statement = encode(" The pass key is") + key + encode(". Remember it.") + key
    statement += encode(" is the pass key.")
    question, opening = encode(" What is the pass key? The pass key is"), encode(PREFIX)

    def place(part: list[int]) -> int:
        (first,) = (i for i in range(len(found)) if found[i : i + len(part)] == part)
        return first

    assert found[-len(question) :] == question
    first, middle = place(opening) + len(opening), place(statement)
    last = middle + len(statement)
    return np.array(found[first:middle], int), np.array(found[last : -len(question)], int)


def uniform(rows: Sequence[Row], vocab: int) -> list[Scored]:
    """A model that knows nothing: all tokens are equally likely, and the argmax is the
    first, id 0.
    """
    found = []
    for row in rows:
        used = row.weights > 0
        nll = np.where(used, np.float32(np.log(vocab)), np.float32(0))
        found.append(Scored(nll, used & (row.targets == 0)))
    return found


def copier(rows: Sequence[Row], vocab: int = 300) -> list[Scored]:
    """A model that finds the earlier place with the longest matching past and gives the token that
    followed it probability 0.9.
    """
    found = []
    for row in rows:
        tokens, used = row.tokens, row.weights > 0
        expected = np.full(len(tokens), -1)
        agree = np.zeros(len(tokens), int)  # [j]: length of the match between the pasts of i and j
        for i in range(len(tokens)):
            same = tokens[:i] == tokens[i]
            agree[1:i] = np.where(same[1:], agree[: i - 1] + 1, 0) if i > 1 else agree[1:i]
            agree[:1] = same[:1] if i else agree[:1]
            if i and agree[:i].max() > 0:
                expected[i] = tokens[int(np.argmax(agree[:i])) + 1]
        hit = used & (expected == row.targets)
        nll = np.where(hit, -np.log(0.9), -np.log(0.1 / (vocab - 1))).astype(np.float32)
        found.append(Scored(np.where(used, nll, np.float32(0)), hit))
    return found
