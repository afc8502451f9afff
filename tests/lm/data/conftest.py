"""A small corpus of text files and a configuration that reads it, for all tests of lm/data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.growth import NO_WARMUP

WORDS = "the quick brown fox jumps over a lazy dog in été and naïve 日本 <|endoftext|> def f(x):\n"


def source(path: object, **changes: object) -> SourceConfig:
    values = {"path": str(path), "text_key": "text", "weight": 1.0, "valid_fraction": 0.3}
    values |= {"token_dtype": "", "max_tokens": 0}
    return SourceConfig(**(values | changes))  # pyright: ignore[reportArgumentType]


def data_config(sources: dict[str, SourceConfig], **changes: object) -> DataConfig:
    values = {
        "tokenizer": TokenizerConfig(
            kind="bytes", path="", vocab_size=512, pattern="gpt2", end_of_text="", bos=""
        ),
        "sources": sources,
        "context_length": 16,
        "batch_size": 4,
        "packing": "concat",
        "batch_warmup": NO_WARMUP,
    }
    return DataConfig(**(values | changes))  # pyright: ignore[reportArgumentType]


def write_corpus(folder: Path, count: int = 20, repeat: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        words = (WORDS * (i // 4 + repeat)).split(" ")
        (folder / f"{i:03}.txt").write_text(" ".join(words[: i * repeat + 1]), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return data_config({"text": source(corpus / "*.txt")})


@pytest.fixture
def make_config() -> Callable[..., DataConfig]:
    return data_config


@pytest.fixture
def make_source() -> Callable[..., SourceConfig]:
    return source


@pytest.fixture
def make_corpus() -> Callable[..., Path]:
    return write_corpus
