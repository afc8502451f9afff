"""tiktoken's published patterns and ids, and start-of-text and end-of-text tokens by name."""

from __future__ import annotations

import base64
import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf

from lm.config import DataConfig, TokenizerConfig, UserError
from lm.data import codecs, tokenizers
from lm.data.prepare import prepare
from lm.data.tokenizers import Tokenizer
from lm.evals import _requests
from lm.evals._requests import Request
from lm.evaluation import generate
from lm.interop import hf_tokenizer

END = codecs.END_OF_TEXT
TEXTS = (
    "Don't we'LL 12345 it's\r\n\r\n  x  \n\tfoo_bar() { return a/b; } //\n\n",
    "Straße ÉTÉ ǅungla 日本語テキスト e\u0301 👩‍🚀 1,234.5 ... \u00a0 trailing   ",
    "   ",
    "\n\n\nA\n b",
    "CamelCaseWords and ALLCAPS don'T",
)


def ranks(path: Path, extra: tuple[bytes, ...] = (b"th", b"the", b" t", b"12", b"123")) -> Path:
    pieces = [*(bytes([i]) for i in range(256)), *extra]
    lines = [f"{base64.b64encode(x).decode()} {i}" for i, x in enumerate(pieces)]
    path.write_text("\n".join(lines))
    return path


def made(kind: str, path: object = "", **named: str) -> Tokenizer:
    values: dict[str, Any] = {"pattern": "gpt2", "end_of_text": "", "bos": ""} | named
    return tokenizers.create(
        TokenizerConfig(kind=kind, path=str(path), vocab_size=1 << 20, **values)  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("name", codecs.PATTERNS)
def test_patterns_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's own constructor gives the expected pattern; the download of ranks is stubbed."""
    pytest.importorskip("tiktoken")
    public: Any = pytest.importorskip("tiktoken_ext.openai_public")
    letters = {bytes([i]): i for i in range(256)}
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, loader, lambda *_, **__: letters)
    import regex

    theirs = public.ENCODING_CONSTRUCTORS[name]()
    for text in TEXTS:
        split = [regex.findall(p, text) for p in (codecs.PATTERNS[name], theirs["pat_str"])]
        assert split[0] == split[1], text
        assert "".join(split[0]) == text
    if name != "gpt2":
        size = {"cl100k_base": 100256, "o200k_base": 199998}[name]
        ours = dict(codecs._PUBLISHED[name, size])
        ours.pop("<|startoftext|>", None)  # only o200k_harmony has it
        assert ours.items() <= theirs["special_tokens"].items()


@pytest.mark.parametrize("pattern", codecs.PATTERNS)
def test_every_pattern_is_lossless_saved_and_exported(tmp_path: Path, pattern: str) -> None:
    pytest.importorskip("tiktoken")
    tokenizer = made("tiktoken", ranks(tmp_path / "r.tiktoken"), pattern=pattern, bos=END)
    assert (tokenizer.end_of_text, tokenizer.bos, tokenizer.vocab_size) == (261, 261, 262)
    for text in TEXTS:
        ids = np.array(tokenizer.encode(text))
        assert tokenizer.lost(text, ids) == ""
        assert tokenizer.decode([261, *ids, 261]) == text
    tokenizer.save(tmp_path / "t.json")
    again = tokenizers.load(tmp_path / "t.json")
    assert (again.sha256, again.options) == (tokenizer.sha256, tokenizer.options)
    plain = made("tiktoken", tmp_path / "r.tiktoken")
    assert plain.sha256 != tokenizer.sha256
    exported = hf.Tokenizer.from_str(
        hf_tokenizer.to_json(tokenizer, hf_tokenizer.payload(tmp_path / "t.json"))
    )
    for text in TEXTS:
        assert exported.encode(text).ids == [261, *tokenizer.encode(text)]


def test_published_ids_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End of text fills a gap in the ranks, follows the last rank, or is set by name."""
    pytest.importorskip("tiktoken")
    path = tmp_path / "r.tiktoken"
    pieces = [*(bytes([i]) for i in range(256)), b"th", b"the"]
    gapped = [i for i in range(259) if i != 257]
    path.write_text(
        "\n".join(
            f"{base64.b64encode(x).decode()} {i}" for x, i in zip(pieces, gapped, strict=True)
        )
    )
    with pytest.raises(UserError, match=r"its 258 ranks are not 0..257"):
        made("tiktoken", path)
    monkeypatch.setitem(codecs._PUBLISHED, ("gpt2", 258), {END: 257})
    tokenizer = made("tiktoken", path)
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (257, 259)
    assert tokenizer.decode(tokenizer.encode("the the")) == "the the"
    ranks(path, (b"th", b"the"))
    monkeypatch.setitem(codecs._PUBLISHED, ("cl100k_base", 258), {END: 260, "<|start|>": 270})
    tokenizer = made("tiktoken", path, pattern="cl100k_base", bos="<|start|>")
    assert (tokenizer.end_of_text, tokenizer.bos, tokenizer.vocab_size) == (260, 270, 271)
    assert tokenizer.token_bytes[[259, 260, 270]].tolist() == [0, 0, 0]
    ids = tokenizer.encode(f"a {END} b <|start|>")
    assert max(ids) < 258
    with pytest.raises(UserError, match=r"no token data.tokenizer.bos='<\|strt\|>'; did you mean"):
        made("tiktoken", path, pattern="cl100k_base", bos="<|strt|>")


def test_end_of_text_and_bos_are_found_by_name(tmp_path: Path) -> None:
    found = hf.Tokenizer(hf.models.BPE())
    found.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["<|begin|>", "<|stop|>"]
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        [], hf.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=names)
    )
    found.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"no end-of-text token .* name one, data.tokenizer.end"):
        made("json", tmp_path / "t.json")
    tokenizer = made("json", tmp_path / "t.json", end_of_text="<|stop|>", bos="<|begin|>")
    assert (tokenizer.bos, tokenizer.end_of_text, tokenizer.start) == (0, 1, [0])
    text = "<|begin|> is text, and so is <|stop|>"
    assert tokenizer.decode([0, *tokenizer.encode(text), 1]) == text
    for kind in ("bytes", "bpe"):
        assert made(kind, bos=END).bos == made(kind).end_of_text
        with pytest.raises(UserError, match=rf"kind='{kind}': it has no token data.tokenizer.bos"):
            made(kind, bos="<s>")


def test_a_request_without_context_is_scored_whole() -> None:
    plain, begun = made("bytes"), made("bytes", bos=END)
    asked = [Request("here", "", "abc"), Request("here", "ab ", "c")]
    found = [[(ids.tolist(), n) for ids, n in _requests.split(asked, x)] for x in (plain, begun)]
    assert found[0] == [([*b"abc"], 1), ([*b"ab c"], 2)]
    assert found[1] == [([256, *b"abc"], 1), ([256, *b"ab c"], 3)]


def test_an_empty_prompt_is_bos_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt begins with bos; without a bos, an empty prompt is refused."""
    given: list[list[list[int]]] = []

    def stand_in(model: Any, params: Any, prompts: Any, **_: Any) -> list[list[int]]:
        given.append(prompts)
        return [[*b"x"] for _ in prompts]

    monkeypatch.setattr(generate, "generate", stand_in)
    options: Any = None
    for tokenizer, start in ((made("bytes"), []), (made("bytes", bos=END), [256])):
        loaded: Any = types.SimpleNamespace(tokenizer=tokenizer, model=None, params=None)
        assert generate.complete(loaded, ["", "a"], options) == ["x", "x"]
        assert given[-1] == [start, [*start, *b"a"]]
    with pytest.raises(UserError, match=r"prompt 0 is empty: .* \(data.tokenizer.bos\); give at"):
        generate._check([[]], generate.Vocabulary(257, 256))


def test_a_document_begins_with_bos(config: DataConfig, tmp_path: Path) -> None:
    """bos comes once, however many pieces the document has. The first token of the text is then a
    target, and its bytes count.
    """
    tokenizer = dataclasses.replace(config.tokenizer, bos=END)
    plain = prepare(config, tmp_path / "data", progress=False).stores["text"]
    begun = prepare(
        dataclasses.replace(config, tokenizer=tokenizer), tmp_path / "data", progress=False
    ).stores["text"]
    for split, store in plain.items():
        other = begun[split]
        assert other.meta["bytes"] == store.meta["bytes"]
        for i in range(store.num_documents):
            ids = other.tokens[other.offsets[i] : other.offsets[i + 1]].tolist()
            assert ids == [256, *store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()]
