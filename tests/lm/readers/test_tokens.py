from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lm.config import DataConfig, TokenizerConfig, UserError
from lm.data.prepare import prepare
from lm.readers import tokens
from tests.lm.data.conftest import data_config, source
from tests.lm.readers.reading import END, read

IDS = [5, 6, 7, END, 8, END, END, 9, 300, 70]
WANTED = [[5, 6, 7], [8], [9, 300, 70]]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 1 << 24])
def test_documents_end_with_the_end_of_text(
    tmp_path: Path, dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for every size of read; consecutive ends count as one."""
    monkeypatch.setattr(tokens, "_CHUNK", chunk)
    for first in ([], [END]):
        ids = np.array([*first, *IDS], dtype)
        np.save(tmp_path / "x.npy", ids)
        ids.tofile(tmp_path / "x.bin")
        for name, changes in {"x.npy": {}, "x.bin": {"token_dtype": dtype}}.items():
            found, left_out = read(tmp_path / name, **changes)
            assert found == [(f"{name}:{i}", part) for i, part in enumerate(WANTED, start=1)]
            assert not left_out
    np.save(tmp_path / "x.npy", np.array([END], dtype))
    assert read(tmp_path / "x.npy") == ([], {"empty": 1})


def test_the_header_of_llm_c_is_read(tmp_path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    path = tmp_path / "x.bin"
    path.write_bytes(header.tobytes() + np.array(IDS, "<u2").tobytes())
    assert [ids for _, ids in read(path)[0]] == WANTED
    with pytest.raises(UserError, match=r"llm.c's header, of uint16; set data.sources.s.token_dt"):
        read(path, token_dtype="uint32")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="18 bytes of uint16 for 10 ids: it is cut short"):
        read(path)


def test_mistakes(tmp_path: Path) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"how wide its ids are; set data.sources.s.token_dtype=u"):
        read(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="3 bytes of uint16: it is cut short"):
        read(tmp_path / "x.bin", token_dtype="uint16")
    np.save(tmp_path / "x.npy", np.array(IDS, "<u2"))
    with pytest.raises(UserError, match=r"set data.sources.s.token_dtype=uint16"):
        read(tmp_path / "x.npy", token_dtype="uint32")
    for ids in (np.array(IDS, "f4"), np.array([IDS], "<u2"), np.array(IDS)):
        np.save(tmp_path / "x.npy", ids)
        with pytest.raises(UserError, match="save one dimension of uint16 or uint32"):
            read(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([None]))
    with pytest.raises(UserError, match=r"cannot read .*x.npy of data.sources.s: "):
        read(tmp_path / "x.npy")


def config(path: Path, **changes: object) -> DataConfig:
    return data_config({"text": source(path, token_dtype="uint16", **changes)})


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_ids_are_taken_as_they_are(tmp_path: Path, fraction: float) -> None:
    """The store equals that of the text. The end of a single document is held out."""
    text = "the quick brown fox été\n" * 50
    (tmp_path / "x.txt").write_text(text)
    np.array([*text.encode(), 256], "<u2").tofile(tmp_path / "x.bin")
    made = [
        prepare(config(tmp_path / name, valid_fraction=fraction), tmp_path / "data", progress=False)
        for name in ("x.txt", "x.bin")
    ]
    stores = [prepared.stores["text"] for prepared in made]
    assert stores[0]["train"].folder != stores[1]["train"].folder
    for key in ("documents", "bytes", "tokens"):
        whole = [sum(split.meta[key] for split in store.values()) for store in stores]
        assert whole[0] == whole[1]
    if fraction:
        assert stores[1]["valid"].meta["bytes"] == round(0.3 * len(text.encode()))
    else:
        sums = [store["train"].meta["tokens_sha256"] for store in stores]
        assert sums[0] == sums[1]


def test_the_tokenizer_is_declared_and_has_every_id(tmp_path: Path) -> None:
    np.array([1, 2, 300, 256], "<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"document 'x.bin:1' has id 300 and the tokenizer 257 ids"):
        prepare(config(tmp_path / "x.bin"), tmp_path / "data", progress=False)
    bpe = TokenizerConfig(
        kind="bpe", path="", vocab_size=300, pattern="gpt2", end_of_text="", bos=""
    )
    trained = dataclasses.replace(config(tmp_path / "x.bin"), tokenizer=bpe)
    words = r"data.sources.text holds ids, and data.tokenizer.kind='bpe' is trained on files"
    with pytest.raises(UserError, match=words):
        prepare(trained, tmp_path / "data", progress=False)


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("x" * 9)
    changes = {"max_tokens": 45, "valid_fraction": 0.0}
    found = prepare(config(tmp_path / "*.txt", **changes), tmp_path / "data", progress=False)
    assert found.stores["text"]["train"].meta["tokens"] == 50  # the fifth document reaches 45
