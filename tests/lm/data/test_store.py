from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.config import TokenizerConfig, UserError
from lm.data import store as store_lib
from lm.data import tokenizers
from lm.data.sources import LeftOut
from lm.data.store import Store, Tokens, Writer, open_store
from lm.data.tokenizers import Tokenizer

SOURCE = {"path": "somewhere"}
TEXTS = ["first", "é", "a longer third one"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizers.create(
        TokenizerConfig(
            kind="bytes", path="", vocab_size=257, pattern="gpt2", end_of_text="", bos=""
        )
    )


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write(tmp_path / "source/train", tokenizer, TEXTS)


def write(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    writer = Writer(folder, tokenizer)
    for text in texts:
        writer.append(np.array(tokenizer.encode(text)), len(text.encode()))
    writer.finish(SOURCE, LeftOut({"empty": 2}, {"empty": "b.txt"}), "hash")
    return folder


def opened(folder: Path, tokenizer: Tokenizer, *, verify: bool = False) -> Store:
    return open_store(folder, tokenizer.sha256, SOURCE, verify=verify)


def document(store: Store, i: int) -> list[int]:
    return store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()


def test_what_is_written_is_read(folder: Path, tokenizer: Tokenizer) -> None:
    store = opened(folder, tokenizer, verify=True)
    assert [document(store, i) for i in range(3)] == [[*text.encode(), 256] for text in TEXTS]
    assert store.lengths.tolist() == [5, 2, 18]
    assert store.num_documents == 3
    expected = {"documents": 3, "tokens": 28, "bytes": 25, "dtype": "uint16", "end_of_text": 256}
    assert expected.items() <= store.meta.items()
    assert store.meta["left_out"] == {"counts": {"empty": 2}, "first": {"empty": "b.txt"}}
    assert store.meta["source"] == {"path": "somewhere"}
    token_bytes = np.array(store.meta["token_bytes"])
    assert token_bytes[store.tokens[:]].sum() == store.meta["bytes"]
    assert np.sum(store.tokens[:] == 256) == store.meta["documents"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for vocab_size, dtype in ((65535, np.uint16), (65536, np.uint32)):
        tokenizer.vocab_size = vocab_size
        folder = write(tmp_path / f"{vocab_size}/train", tokenizer, TEXTS)
        store = opened(folder, tokenizer)
        assert store.tokens[:].dtype == dtype
        assert document(store, 0) == [*b"first", 256]


def test_an_empty_split_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = opened(write(tmp_path / "s/valid", tokenizer, []), tokenizer, verify=True)
    assert store.num_documents == 0
    assert store.lengths.tolist() == []


def truncate(folder: Path) -> None:
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(content[:-3])


def shift_offset(folder: Path) -> None:
    offsets = np.fromfile(folder / "docs.idx", np.int64)
    offsets[1] += 1
    offsets.tofile(folder / "docs.idx")


def drop_key(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    del meta["tokens"]
    (folder / "meta.json").write_text(json.dumps(meta))


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"tokens.bin: size in bytes is 53, expected 56; delete .*source and"),
    "offsets": (shift_offset, r"docs.idx: sha256 is \w{12}, expected \w{12}; delete"),
    "digests": (lambda f: (f / "chunks.sum").write_bytes(bytes(16)), "chunks.sum: sha256 is"),
    "no_tokens": (lambda f: (f / "tokens.bin").unlink(), "tokens.bin is missing; delete"),
    "no_docs": (lambda f: (f / "docs.idx").unlink(), "docs.idx is missing; delete"),
    "no_meta": (lambda f: (f / "meta.json").unlink(), "meta.json is missing; delete"),
    "half_meta": (lambda f: (f / "meta.json").write_text('{"tok'), "meta.json is not readable"),
    "key": (drop_key, "meta.json lacks tokens; delete"),
    "list": (lambda f: (f / "meta.json").write_text("[]"), "meta.json lacks bytes"),
    "word": (lambda f: (f / "meta.json").write_text("3"), "meta.json is not readable"),
    "nested": (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json is not readable"),
    "count": (lambda f: replace(f / "meta.json", '"empty": 2', '"empty": 3'), "meta.json: sha256"),
    "renamed": (lambda f: f.rename(f.with_name("valid")), "meta.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        opened(folder, tokenizer)
    assert "\n" not in str(caught.value)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_changed_tokens_are_found_by_verify(folder: Path, tokenizer: Tokenizer) -> None:
    flip(folder / "tokens.bin", 4)
    opened(folder, tokenizer)
    words = r"tokens.bin: digest of bytes 0 on is \w{12}, expected \w{12}; delete .*source and"
    with pytest.raises(UserError, match=words):
        opened(folder, tokenizer, verify=True)


def test_a_chunk_is_compared_when_it_is_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is compared once per process, however it is read; other chunks are not read."""
    monkeypatch.setattr(store_lib, "CHUNK", 64)  # 32 ids
    texts = [letter * 50 for letter in "abcdef"]  # 51 ids each: 10 chunks, the last of 18 ids
    folder = write(tmp_path / "s/train", tokenizer, texts)
    assert (folder / "chunks.sum").stat().st_size == 10 * 16
    whole = opened(folder, tokenizer, verify=True).tokens[:]
    assert whole.tolist() == [i for text in texts for i in [*text.encode(), 256]]
    read: list[int] = []
    check = Tokens._check
    monkeypatch.setattr(Tokens, "_check", lambda self, i: (read.append(i), check(self, i)))
    flip(folder / "tokens.bin", 2 * 32 * 4)  # the first of chunk 4
    store = opened(folder, tokenizer)
    for _ in range(2):
        np.testing.assert_array_equal(store.tokens[32:128], whole[32:128])
        np.testing.assert_array_equal(store.tokens[np.array([300, 200])], whole[[300, 200]])
    assert read == [1, 2, 3, 6, 9]
    assert store.tokens[40:40].tolist() == []
    for where in (slice(100, 129), np.array([5, 130])):
        with pytest.raises(UserError, match=r"tokens\.bin: digest of bytes 256 on is"):
            store.tokens[where]


def test_pieces_of_a_document_make_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    writer = Writer(tmp_path / "s/train", tokenizer)
    for part in ("ab", "cd", "e"):
        writer.append(np.array(tokenizer.encode(part)), len(part), is_last=part == "e")
    writer.append(np.array(tokenizer.encode("f")), 1)
    writer.finish(SOURCE, LeftOut(), "hash")
    store = opened(tmp_path / "s/train", tokenizer)
    assert [document(store, i) for i in range(2)] == [[*b"abcde", 256], [*b"f", 256]]
    assert store.meta["bytes"] == 6


@pytest.mark.parametrize("name", ["split", "source"])
def test_another_split_or_source_is_refused(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    source = {"path": "elsewhere"} if name == "source" else SOURCE
    folder = folder.rename(folder.with_name("valid")) if name == "split" else folder
    with pytest.raises(UserError, match=f"meta.json: {name} is "):
        open_store(folder, tokenizer.sha256, source)


def test_another_tokenizer_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    words = f"tokenizer sha256 is {tokenizer.sha256[:12]}, expected 000000000000; delete"
    with pytest.raises(UserError, match=words):
        open_store(folder, "0" * 64, SOURCE)
