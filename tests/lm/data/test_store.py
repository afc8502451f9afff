from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.config import TokenizerConfig, UserError
from lm.data import tokenizers
from lm.data.store import Store, Writer, open_store
from lm.data.tokenizers import Tokenizer

TEXTS = ["first", "é", "a longer third one"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizers.create(TokenizerConfig(kind="bytes", path="", vocab_size=257))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write(tmp_path / "source/train", tokenizer, TEXTS)


def write(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    writer = Writer(folder, tokenizer)
    for text in texts:
        writer.append(np.array(tokenizer.encode(text)), len(text.encode()))
    writer.finish({"path": "somewhere"}, collections.Counter(empty=2))
    return folder


def document(store: Store, i: int) -> list[int]:
    return store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()


def test_what_is_written_is_read(folder: Path, tokenizer: Tokenizer) -> None:
    store = open_store(folder, tokenizer.sha256, verify=True)
    assert [document(store, i) for i in range(3)] == [[*text.encode(), 256] for text in TEXTS]
    assert store.lengths.tolist() == [5, 2, 18]
    assert store.num_documents == 3
    expected = {"documents": 3, "tokens": 28, "bytes": 25, "dtype": "uint16", "end_of_text": 256}
    assert expected.items() <= store.meta.items()
    assert store.meta["skipped"] == {"empty": 2}
    assert store.meta["source"] == {"path": "somewhere"}
    token_bytes = np.array(store.meta["token_bytes"])
    assert token_bytes[store.tokens].sum() == store.meta["bytes"]
    assert np.sum(store.tokens == 256) == store.meta["documents"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for vocab_size, dtype in ((65535, np.uint16), (65536, np.uint32)):
        tokenizer.vocab_size = vocab_size
        folder = write(tmp_path / f"{vocab_size}/train", tokenizer, TEXTS)
        store = open_store(folder, tokenizer.sha256)
        assert store.tokens.dtype == dtype
        assert document(store, 0) == [*b"first", 256]


def test_an_empty_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = open_store(write(tmp_path / "s/valid", tokenizer, []), tokenizer.sha256, verify=True)
    assert store.num_documents == 0
    assert store.lengths.tolist() == []


def truncate(folder: Path) -> None:
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(content[:-3])


def shift_offset(folder: Path) -> None:
    offsets = np.fromfile(folder / "docs.idx", np.int64)
    offsets[1] = offsets[2]
    offsets.tofile(folder / "docs.idx")


def end_early(folder: Path) -> None:
    offsets = np.fromfile(folder / "docs.idx", np.int64)
    offsets[-1] -= 1
    offsets.tofile(folder / "docs.idx")


def drop_key(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    del meta["tokens"]
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"tokens.bin: size in bytes is 53, expected 56; delete .*source and"),
    "offsets": (shift_offset, "docs.idx: shortest document is 0, expected at least 2 tokens"),
    "end": (end_early, r"docs.idx: range is 0..27, expected 0..28"),
    "no_tokens": (lambda f: (f / "tokens.bin").unlink(), "tokens.bin is missing; delete"),
    "no_docs": (lambda f: (f / "docs.idx").unlink(), "docs.idx is missing; delete"),
    "no_meta": (lambda f: (f / "meta.json").unlink(), "meta.json is missing; delete"),
    "half_meta": (lambda f: (f / "meta.json").write_text('{"tok'), "meta.json is not readable"),
    "key": (drop_key, "meta.json lacks tokens; delete"),
    "list": (lambda f: (f / "meta.json").write_text("[]"), "meta.json lacks bytes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        open_store(folder, tokenizer.sha256)
    assert "\n" not in str(caught.value)


def test_changed_tokens_are_found_by_verify(folder: Path, tokenizer: Tokenizer) -> None:
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[4] ^= 1
    (folder / "tokens.bin").write_bytes(content)
    open_store(folder, tokenizer.sha256)
    with pytest.raises(UserError, match=r"tokens.bin: sha256 is \w{12}, expected \w{12}; delete"):
        open_store(folder, tokenizer.sha256, verify=True)


def test_another_tokenizer_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    words = f"tokenizer sha256 is {tokenizer.sha256[:12]}, expected 000000000000; delete"
    with pytest.raises(UserError, match=words):
        open_store(folder, "0" * 64)
