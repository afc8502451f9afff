from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.config import DataConfig, SourceConfig, TokenizerConfig, UserError
from lm.data import documents, sources, splits
from lm.data import prepare as prepare_lib
from lm.data.prepare import Prepared, prepare, resolve_data_dir
from lm.data.store import Writer
from lm.data.tokenizers import Tokenizer

MakeConfig = Callable[..., DataConfig]
MakeSource = Callable[..., SourceConfig]
BPE = TokenizerConfig(kind="bpe", path="", vocab_size=300, pattern="gpt2", end_of_text="", bos="")

CHILD = """
import sys
from pathlib import Path
from lm.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.growth import NO_WARMUP
from lm.data.prepare import prepare
source = SourceConfig(path=sys.argv[1], text_key="text", weight=1.0, valid_fraction=0.3,
                      token_dtype="", max_tokens=0)
tokenizer = TokenizerConfig(kind=sys.argv[3], path="", vocab_size=300,
                            pattern="gpt2", end_of_text="", bos="")
config = DataConfig(tokenizer=tokenizer, sources={"text": source}, context_length=16, batch_size=4,
                    packing="concat", batch_warmup=NO_WARMUP)
prepared = prepare(config, Path(sys.argv[2]), progress=False)
print(prepared.stores["text"]["train"].meta["tokens_sha256"])
"""


def child(corpus: Path, data_dir: Path, kind: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        CHILD,
        str(corpus / "*.txt"),
        str(data_dir),
        kind,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def texts(prepared: Prepared, split: str) -> list[str]:
    store = prepared.stores["text"][split]
    spans = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [prepared.tokenizer.decode(store.tokens[a:b]) for a, b in spans]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_splits_and_ledger(config: DataConfig, corpus: Path, tmp_path: Path, kind: str) -> None:
    if kind == "bpe":
        config = dataclasses.replace(config, tokenizer=BPE)
    prepared = prepare(config, tmp_path / "data", progress=False, verify=True)
    contents = {path.name: path.read_text("utf-8") for path in sorted(corpus.iterdir())}
    held_out = {name for name in contents if splits.is_valid(name, 0.3)}
    assert 0 < len(held_out) < len(contents)
    assert texts(prepared, "valid") == [contents[n] for n in contents if n in held_out]
    assert texts(prepared, "train") == [contents[n] for n in contents if n not in held_out]
    assert any("<|endoftext|>" in text for text in texts(prepared, "train"))
    end = prepared.tokenizer.end_of_text
    for store in prepared.stores["text"].values():
        np.testing.assert_array_equal(np.flatnonzero(store.tokens[:] == end), store.offsets[1:] - 1)
        assert prepared.tokenizer.token_bytes[store.tokens[:]].sum() == store.meta["bytes"]
        assert store.meta["tokenizer_sha256"] == prepared.tokenizer.sha256
    assert sum(s.meta["bytes"] for s in prepared.stores["text"].values()) == sum(
        len(text.encode()) for text in contents.values()
    )


def test_second_time_reads_nothing(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, tokenizer=BPE)
    first = prepare(config, tmp_path / "data", progress=False)
    monkeypatch.setattr(documents, "documents", None)
    second = prepare(config, tmp_path / "data", progress=False)
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert second.stores["text"]["train"].folder == first.stores["text"]["train"].folder


def test_what_changes_content_changes_the_folder(
    config: DataConfig, corpus: Path, tmp_path: Path, make_source: MakeSource
) -> None:
    def folder(config: DataConfig) -> Path:
        prepared = prepare(config, tmp_path / "data", progress=False)
        return prepared.stores["text"]["train"].folder

    def with_source(**changes: object) -> DataConfig:
        return dataclasses.replace(
            config, sources={"text": make_source(corpus / "*.txt", **changes)}
        )

    first = folder(config)
    assert folder(with_source(weight=0.5)) == first
    assert folder(dataclasses.replace(config, context_length=32, batch_size=8)) == first
    assert folder(with_source(valid_fraction=0.4)) != first
    assert folder(dataclasses.replace(config, tokenizer=BPE)) != first
    (corpus / "000.txt").write_text("changed")
    assert folder(config) != first


def test_bpe_is_trained_on_weighted_training_documents_only(
    tmp_path: Path, make_config: MakeConfig, make_source: MakeSource
) -> None:
    for name, text in {"seen": "seen " * 50, "held": "held " * 50, "other": "other " * 50}.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/a.txt").write_text(text)
    config = make_config(
        {
            "seen": make_source(tmp_path / "seen/*.txt", valid_fraction=0.0),
            "held": make_source(tmp_path / "held/*.txt", valid_fraction=1.0, weight=0.0),
        },
        tokenizer=BPE,
    )
    prepared = prepare(config, tmp_path / "data", progress=False)
    assert len(prepared.tokenizer.encode(" seen")) == 1
    assert len(prepared.tokenizer.encode(" held")) == 5
    assert prepared.stores["held"]["valid"].num_documents == 1
    other = make_config({"other": make_source(tmp_path / "other/*.txt", valid_fraction=0.0)})
    given = prepare(other, tmp_path / "data", progress=False, tokenizer=prepared.tokenizer)
    assert given.tokenizer is prepared.tokenizer
    assert given.stores["other"]["train"].meta["tokenizer_sha256"] == prepared.tokenizer.sha256


def test_what_cannot_be_divided_is_refused(
    tmp_path: Path, make_config: MakeConfig, make_source: MakeSource
) -> None:
    (tmp_path / "one.txt").write_text("é")
    for changes in ({}, {"valid_fraction": 0.0}, {"weight": 0.0, "valid_fraction": 1.0}):
        config = make_config({"text": make_source(tmp_path / "one.txt", **changes)})
        if changes:  # what the message advises
            prepare(config, tmp_path / "data", progress=False)
            continue
        with pytest.raises(UserError, match="each of its 1 documents is a single letter; set data"):
            prepare(config, tmp_path / "data", progress=False)
    (tmp_path / "none.txt").write_text("")
    config = make_config({"text": make_source(tmp_path / "none.txt")})
    with pytest.raises(
        UserError,
        match=r"data.sources.text holds no text \(left out: 1 empty \(first .*none.txt\)\)",
    ):
        prepare(config, tmp_path / "data", progress=False)


def test_a_lossy_tokenizer_is_refused(config: DataConfig, tmp_path: Path) -> None:
    import tokenizers as hf

    lossy = hf.Tokenizer(hf.models.BPE())
    lossy.normalizer = hf.normalizers.Replace(hf.Regex("quick"), "")
    lossy.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    lossy.train_from_iterator(
        [], hf.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special)
    )
    lossy.save(str(tmp_path / "lossy.json"))
    tokenizer = TokenizerConfig(
        kind="json",
        path=str(tmp_path / "lossy.json"),
        vocab_size=300,
        pattern="gpt2",
        end_of_text="",
        bos="",
    )
    words = "document '001.txt': 'the quick' comes back from its tokens as 'the ': a lossy"
    with pytest.raises(UserError, match=words):
        prepare(dataclasses.replace(config, tokenizer=tokenizer), tmp_path / "data", progress=False)
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"]


class Panic(BaseException):
    """Like the exceptions of libraries in Rust, it is not an Exception."""


def test_a_document_that_cannot_be_tokenized_is_named(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode_batch

    def fail(self: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        if any(text.startswith("the quick brown fox") and len(text) < 22 for text in texts):
            raise Panic("called `Result::unwrap()`\non an `Err`")
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    words = r"cannot tokenize document '003.txt': called `Result::unwrap\(\)` on an `Err`"
    with pytest.raises(UserError, match=words):
        prepare(config, tmp_path / "data", progress=False)
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"]


def test_what_is_left_out_is_counted_and_warned_of(
    config: DataConfig, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is logged for data prepared earlier too, and once per process."""
    for i in range(3):
        (corpus / f"{i}.utf16.txt").write_text("text", encoding="utf-16")
    (corpus / "none.txt").write_text("")
    (corpus / "gone.txt").symlink_to(corpus / "nothing")
    (corpus / "again.txt").symlink_to(corpus / "007.txt")
    counts = {"broken link": 1, "duplicate file": 1, "undecodable": 3, "empty": 1}
    for made_anew in (True, False):
        for _ in range(2):
            prepared = prepare(config, tmp_path / "data", progress=False)
            assert prepared.left_out_counts == {"text": counts}
        (line,) = caplog.messages
        assert line.startswith("data.sources.text: 20 documents; left out: 1 ")
        assert f"3 undecodable (first {corpus}/0.utf16.txt)" in line
        if made_anew:
            caplog.clear()
            sources.warn_left_out.cache_clear()
    held = sum(store.num_documents for store in prepared.stores["text"].values())
    assert held == 20


def test_names_and_folders_that_are_too_long_are_refused(
    config: DataConfig, tmp_path: Path, make_config: MakeConfig
) -> None:
    long = make_config({"a" * 300: config.sources["text"]})
    assert prepare(long, tmp_path / "data", progress=False).stores
    for name in ("b" * 300, "c/" * 4000):
        with pytest.raises(
            UserError, match="File name too long; choose a shorter path, or set --data_dir"
        ) as caught:
            prepare(config, tmp_path / name, progress=False)
        assert "free some space" not in str(caught.value)


def test_a_file_system_without_locks_is_refused(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        UserError, match=r"has no locks \(flock\); mount it with locks, .* or set --data_dir"
    ) as caught:
        prepare(config, tmp_path / "data", progress=False)
    assert "free some space" not in str(caught.value)


def test_long_documents_are_tokenized_in_pieces(
    tmp_path: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trained tokenizer and the ids are the same, as pieces are cut between words."""
    text = "".join(f"word{i % 7} été, {i} -- " for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    config = make_config(
        {"text": make_source(tmp_path / "[ab].*", valid_fraction=0.0)}, tokenizer=BPE
    )
    whole = prepare(config, tmp_path / "whole", progress=False)
    monkeypatch.setattr(documents, "PIECE", 128)
    monkeypatch.setattr(documents, "_WINDOW", 64)
    parts = prepare(config, tmp_path / "parts", progress=False)
    assert parts.tokenizer.sha256 == whole.tokenizer.sha256
    assert texts(parts, "train") == texts(whole, "train") == [text, text]
    sums = [p.stores["text"]["train"].meta["tokens_sha256"] for p in (whole, parts)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    append, calls = Writer.append, iter(range(100))

    def fail(self: Writer, ids: np.ndarray, num_bytes: int, *, is_last: bool) -> None:
        if next(calls) == 5:
            raise OSError(code, os.strerror(code))
        append(self, ids, num_bytes, is_last=is_last)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", fail)
        with pytest.raises(
            UserError, match=rf"cannot write .*{os.strerror(code)}; free some space"
        ):
            prepare(config, tmp_path / "data", progress=False)
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"]
    assert prepare(config, tmp_path / "data", progress=False).stores["text"]["train"].num_documents


def test_an_interrupted_preparation_leaves_nothing(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "data", progress=False)
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"]


def test_leftovers_of_a_killed_process_are_removed(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config, tmp_path / "data", progress=False).stores["text"]["train"].folder.parent
    shutil.rmtree(first)
    leftover = first.with_name(f".{first.name}.tmp-1")
    (leftover / "train").mkdir(parents=True)
    prepare(config, tmp_path / "data", progress=False)
    assert first.is_dir()
    assert not leftover.exists()


def test_a_data_dir_that_is_a_file_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"set --data_dir \(or ESPALIER_DATA\)"):
        prepare(config, tmp_path / "data", progress=False)


def test_two_processes_prepare_the_same_data_at_once(corpus: Path, tmp_path: Path) -> None:
    processes = [child(corpus, tmp_path / "data", "bpe") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    kinds = sorted(path.name.split("-")[0] for path in (tmp_path / "data").iterdir())
    assert kinds == [".text", ".tokenizer", "text", "tokenizer"]  # the dotted ones are locks


def test_the_second_process_waits_and_reuses(
    config: DataConfig, corpus: Path, tmp_path: Path
) -> None:
    made = prepare(config, tmp_path / "made", progress=False).stores["text"]["train"].folder.parent
    waiting = tmp_path / "data"
    waiting.mkdir()
    with open(waiting / f".{made.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = child(corpus, waiting, "bytes")
        assert process.stderr is not None
        assert "another process is preparing text-" in process.stderr.readline()
        shutil.copytree(made, waiting / made.name)
        (waiting / made.name / "marker").touch()
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert output
    assert (waiting / made.name / "marker").exists()


def test_data_dir_is_the_flag_or_the_environment_or_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    assert resolve_data_dir() == Path("/home/someone/.cache/espalier")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve_data_dir() == tmp_path / "espalier"
    monkeypatch.setenv("ESPALIER_DATA", "~/data")
    assert resolve_data_dir() == Path("/home/someone/data")
    assert resolve_data_dir("/flag") == Path("/flag")
    with pytest.raises(UserError, match="s3://bucket, an address; name a folder of a mounted file"):
        resolve_data_dir("s3://bucket")


def test_a_text_that_is_too_small_for_the_vocabulary_is_warned_of(
    corpus: Path,
    tmp_path: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether its tokenizer is trained now or was trained earlier. Text that gives all tokens is
    large enough.
    """
    few = dataclasses.replace(BPE, vocab_size=260)
    enough = make_config({"text": make_source(corpus / "*.txt")}, tokenizer=few)
    prepare(enough, tmp_path / "data", progress=False)
    assert not caplog.messages
    (tmp_path / "six.txt").write_text("word\n\n")
    small = make_config({"text": make_source(tmp_path / "six.txt")}, tokenizer=BPE)
    for _ in range(2):
        caplog.clear()
        prepare_lib._warn_of_small_text.cache_clear()
        prepare(small, tmp_path / "data", progress=False)
        (line,) = caplog.messages
        assert "tokens in 6 bytes of text" in line
        assert "too little for data.tokenizer.vocab_size=300" in line
        assert "set data.tokenizer.kind=bytes and data.tokenizer.vocab_size=257" in line
