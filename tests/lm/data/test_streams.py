"""Sets that `datasets` streams are read into the store once, up to a number of tokens."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lm.config import DataConfig, SourceConfig, TokenizerConfig, UserError
from lm.data import streams
from lm.data.prepare import prepare

MakeConfig = Callable[..., DataConfig]
MakeSource = Callable[..., SourceConfig]
CALLS: list[tuple[Any, ...]] = []


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package; its data set never ends."""

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        CALLS.append((name, config, split, streaming))

        def texts() -> Iterator[dict[str, str]]:
            i = 0
            while True:
                yield {"text": f"text number {i}", "id": "the same"}
                i += 1

        return texts()

    CALLS.clear()
    module = types.ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_stream_is_read_once_and_no_further_than_asked(
    tmp_path: Path, make_config: MakeConfig, make_source: MakeSource, datasets: None
) -> None:
    """Neither split is empty, although all documents have the same id."""
    source = make_source("datasets:a/b:en:train", max_tokens=2000, valid_fraction=0.2)
    config = make_config({"text": source})
    first = prepare(config, tmp_path / "data", progress=False).stores["text"]
    assert set(CALLS) == {("a/b", "en", "train", True)}
    read = len(CALLS)
    again = prepare(config, tmp_path / "data", progress=False).stores["text"]
    assert len(CALLS) == read
    assert again["train"].folder == first["train"].folder
    sizes = [first[split].meta["tokens"] for split in ("train", "valid")]
    assert 2000 <= sum(sizes) < 2000 + 20
    assert 0.1 < sizes[1] / sum(sizes) < 0.3


def test_mistakes(
    tmp_path: Path, make_config: MakeConfig, make_source: MakeSource, datasets: None
) -> None:
    def refusal(path: str, **changes: Any) -> str:
        tokenizer = changes.pop(
            "tokenizer",
            TokenizerConfig(
                kind="bytes", path="", vocab_size=257, pattern="gpt2", end_of_text="", bos=""
            ),
        )
        config = make_config({"text": make_source(path, **changes)}, tokenizer=tokenizer)
        with pytest.raises(UserError) as caught:
            prepare(config, tmp_path / "data", progress=False)
        return str(caught.value)

    assert "set data.sources.text.max_tokens=1000000" in refusal("datasets:a:train")
    for path in ("datasets:a", "datasets:a::train", "datasets:a:b:c:d"):
        assert "write datasets:NAME:SPLIT or" in refusal(path, max_tokens=9)
    bpe = TokenizerConfig(
        kind="bpe", path="", vocab_size=300, pattern="gpt2", end_of_text="", bos=""
    )
    message = refusal("datasets:a:train", max_tokens=9, tokenizer=bpe)
    assert "data.sources.text is a stream, which is read once, and data.tokenizer.kind=" in message
    assert "has no key 'body'" in refusal("datasets:a:train", max_tokens=9, text_key="body")


def test_a_missing_package_is_a_user_error(
    tmp_path: Path,
    make_config: MakeConfig,
    make_source: MakeSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = make_config({"text": make_source("datasets:a:train", max_tokens=9)})
    with pytest.raises(UserError, match=r"datasets is missing; .*pip install .*\[stream\]"):
        prepare(config, tmp_path / "data", progress=False)


def test_names() -> None:
    assert streams.parse("datasets:a/b:train", "x") == streams.Stream("a/b", "", "train")
    assert str(streams.parse("datasets:a/b:en:train", "x")) == "datasets:a/b:en:train"


def test_a_set_of_the_package_itself_is_read(
    tmp_path: Path, make_config: MakeConfig, make_source: MakeSource
) -> None:
    """It streams a local folder, which needs no network."""
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"text number {i}"}) for i in range(50)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("\n".join(lines))
    source = make_source(f"datasets:{tmp_path}/set:train", max_tokens=300, valid_fraction=0.2)
    stores = prepare(make_config({"text": source}), tmp_path / "data", progress=False).stores
    assert 300 <= sum(store.meta["tokens"] for store in stores["text"].values()) < 320
