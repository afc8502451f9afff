"""Which text is held out: whole documents by their keys, or the tails if there are few."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data import prepare as prepare_module
from lm.data import splits
from lm.data.prepare import Prepared, prepare
from lm.data.splits import HASH, RANK, TAILS

MakeConfig = Callable[..., DataConfig]
MakeSource = Callable[..., SourceConfig]
BPE = TokenizerConfig(kind="bpe", path="", vocab_size=300, pattern="gpt2", end_of_text="", bos="")


def texts(prepared: Prepared, split: str) -> list[str]:
    store = prepared.stores["text"][split]
    spans = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [prepared.tokenizer.decode(store.tokens[a:b]) for a, b in spans]


def test_split_is_stable_and_near_its_fraction() -> None:
    keys = [f"{i}.py" for i in range(4000)]
    valid = {key for key in keys if splits.is_valid(key, 0.1)}
    assert abs(len(valid) / 4000 - 0.1) < 0.015
    # A larger fraction keeps what was held out.
    assert valid < {key for key in keys if splits.is_valid(key, 0.2)}
    assert not any(splits.is_valid(key, 0.0) for key in keys)
    assert all(splits.is_valid(key, 1.0) for key in keys)
    # As fractions, the sha256 of these keys are 0.1865, 0.2690 and 0.8785.
    fractions = {
        key: next(f / 100 for f in range(101) if splits.is_valid(key, f / 100)) for key in keys[:3]
    }
    assert fractions == {"0.py": 0.19, "1.py": 0.27, "2.py": 0.88}


def test_the_rule_follows_the_number_of_documents() -> None:
    """Documents are held out whole, by hash if neither split is then empty, else by rank if there
    are enough of them.
    """
    keys = [f"{i}.py" for i in range(3)]  # as fractions 0.1865, 0.2690 and 0.8785
    assert splits.choose(keys, 0.25) == (HASH, 0.25)
    assert splits.choose(keys, 0.15) == (TAILS, 0.0)
    assert splits.choose(keys[:2], 0.5) == (RANK, splits.fraction_of("1.py"))
    assert splits.choose(["same"] * 30, 0.1) == (TAILS, 0.0)
    assert splits.choose([], 0.1) == (TAILS, 0.0)
    assert splits.choose(iter(()), 0.0) == (HASH, 0.0)
    none = [key for key in (f"{i}" for i in range(60)) if splits.fraction_of(key) > 0.1][:20]
    rule, threshold = splits.choose(none, 0.1)
    assert rule == RANK
    assert sum(splits.is_valid(key, threshold) for key in none) == 2


def test_only_the_keys_that_decide_are_read() -> None:
    keys = iter([f"{i}.py" for i in range(99)])
    assert splits.choose(keys, 0.25).rule == HASH
    assert next(keys) == "2.py"


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.3, 0.5, 0.95, 1 - 1e-9])
@pytest.mark.parametrize(
    "text", ["ab", "éé", "日本語のテキスト", "one two", "a\nb", "\n\n\n", " ", "x" * 999, "w " * 99]
)
def test_both_parts_of_a_text_are_text(text: str, fraction: float) -> None:
    data = memoryview(text.encode())
    place = splits.tail(data, fraction)
    head, rest = (str(part, "utf-8") for part in (data[:place], data[place:]))
    assert head + rest == text
    assert head or len(text) == 1
    assert bool(rest) == (len(text) > 1)


def test_a_cut_is_where_a_line_begins_or_a_word_ends() -> None:
    lines = b"".join(b"line %d\n" % i for i in range(100))
    place = splits.tail(lines, 0.3)
    assert lines[:place].endswith(b"\n")
    assert abs(len(lines) - place - 0.3 * len(lines)) < 8
    words = b"word " * 100
    assert words[splits.tail(words, 0.3) :].startswith(b" word")


def test_tokens_are_cut_by_their_number() -> None:
    assert splits.tail(np.arange(100), 0.05) == 95
    assert splits.tail(np.arange(2), 1e-9) == 1
    assert splits.tail(np.arange(2), 1 - 1e-9) == 1
    assert splits.tail(np.arange(1), 0.5) == 1


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "bpe"])
def test_one_file_has_a_validation_set(
    tmp_path: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    capsys: pytest.CaptureFixture[str],
    fraction: float,
    kind: str,
) -> None:
    """The end of the file is held out; the model and the tokenizer train on the beginning alone."""
    text = "".join(f"line {i} of the only file\n" for i in range(400)) + "été"
    path = tmp_path / f"one.{'jsonl' if kind == 'jsonl' else 'txt'}"
    path.write_text(json.dumps({"text": text}) if kind == "jsonl" else text)
    config = make_config({"text": make_source(path, valid_fraction=fraction)})
    if kind == "bpe":
        config = dataclasses.replace(config, tokenizer=BPE)
    for folder in ("data", "data"):  # prepared, then reused
        prepared = prepare(config, tmp_path / folder)
    (train,), (valid,) = texts(prepared, "train"), texts(prepared, "valid")
    assert train + valid == text
    assert train.endswith("\n") or fraction < 0.01
    assert abs(len(valid.encode()) / len(text.encode()) - fraction) < 0.01
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 1
    assert message[0].startswith("data.sources.text: the end of its document is held out, ")
    prepare_module._say.cache_clear()


def test_the_tails_of_few_documents_or_whole_ones_of_many(
    tmp_path: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A twentieth of 3 files is less than one file, of 30 it is one or two; no split is empty."""
    for count, fraction, words in (
        (3, 0.05, "the end of each of 3 documents is held out, "),
        (30, 0.05, "1 of 30 documents is held out, 3.33 % of the bytes"),
        (30, 1e-9, "the end of each of 30 documents is held out, "),
        (30, 1 - 1e-9, "the end of each of 30 documents is held out, "),
    ):
        folder = tmp_path / f"{count}"
        folder.mkdir(exist_ok=True)
        for i in range(count):
            (folder / f"{i:02}.txt").write_text("words and more words\n" * 6)
        config = make_config({"text": make_source(folder / "*.txt", valid_fraction=fraction)})
        prepared = prepare(config, tmp_path / "data")
        assert f"data.sources.text: {words}" in capsys.readouterr().err
        assert all(store.num_documents for store in prepared.stores["text"].values())
        prepare_module._say.cache_clear()
