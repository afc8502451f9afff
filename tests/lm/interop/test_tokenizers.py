"""An exported tokenizer gives the same ids in the `tokenizers` package."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tokenizers as hf

from lm.config import TokenizerConfig
from lm.data import codecs, tokenizers
from lm.data.tokenizers import Tokenizer
from lm.interop import hf_tokenizer

TEXTS = (
    "def f(x):\n    return x + 1\n",
    "naïve café, 東京 — 12345 don't",
    "  spaces   \t\n\n\nand 'quotes' they're here",
    "",
    "\x00\x7f",
)
CORPUS = [*TEXTS, "the quick brown fox returns the number of the function " * 5] * 3


def trained(size: int) -> Tokenizer:
    return tokenizers.create(
        TokenizerConfig(
            kind="bpe", path="", vocab_size=size, pattern="gpt2", end_of_text="", bos=""
        ),
        CORPUS,
    )


def ranks(folder: Path) -> str:
    """Writes a .tiktoken file of the learned merges."""
    path = folder / "trained.json"
    trained(330).save(path)
    found = hf.Tokenizer.from_str(hf_tokenizer.payload(path))
    alphabet = codecs.byte_alphabet()
    tokens = sorted((i, t) for t, i in found.get_vocab().items() if t != tokenizers.END_OF_TEXT)
    pieces = [bytes(alphabet[letter] for letter in token) for _, token in tokens]
    lines = (f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(pieces))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["bytes", "tokenizers", "tiktoken"])
def test_an_exported_tokenizer_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    if kind == "tiktoken":
        pytest.importorskip("tiktoken")
        tokenizer = Tokenizer(kind, ranks(tmp_path))
        assert len(tokenizer.encode("the function")) < 6
    else:
        tokenizer = Tokenizer("bytes", "") if kind == "bytes" else trained(330)
    tokenizer.save(tmp_path / "tokenizer.json")
    text = hf_tokenizer.to_json(tokenizer, hf_tokenizer.payload(tmp_path / "tokenizer.json"))
    theirs = hf.Tokenizer.from_str(text)
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    for sample in (*TEXTS, CORPUS[-1], "words that were not seen: zyzzyva ünîcödé"):
        ids = tokenizer.encode(sample)
        assert theirs.encode(sample, add_special_tokens=False).ids == ids
        assert theirs.decode(ids) == sample
    config = hf_tokenizer.config(tokenizer, text, 512)
    assert theirs.token_to_id(config["eos_token"]) == tokenizer.end_of_text
    assert Tokenizer("tokenizers", text).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
