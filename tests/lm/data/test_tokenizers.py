from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf

from lm.config import TokenizerConfig, UserError
from lm.data import codecs, tokenizers
from lm.data.tokenizers import Tokenizer

TEXTS = [
    *["def f(x):\n    return x + 1\n" * 20, "e\u0301 is not é"],
    "été naïve 日本語 🎉 \x00\x1f\x7f\t\r\n    tabs\t\t",
    "a<|endoftext|>b <|endoftext|><|endoftext|>",
    " leading and trailing  ",
    "</s> [EOS] <|end_of_text|>",
]


def config(kind: str, path: object = "", vocab_size: int = 400) -> TokenizerConfig:
    values: Any = {"kind": kind, "path": str(path), "vocab_size": vocab_size}
    return TokenizerConfig(**values, **codecs.Options()._asdict())


def bpe(vocab_size: int = 300) -> Tokenizer:
    return tokenizers.create(config("bpe", vocab_size=vocab_size), TEXTS)


def write_json(folder: Path, **changes: object) -> Path:
    """Writes a tokenizer.json trained on this tiny corpus, with changed settings."""
    bpe().save(folder / "saved.json")
    settings = json.loads(json.loads((folder / "saved.json").read_text())["payload"]) | changes
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(settings))
    return path


def write_ranks(folder: Path) -> Path:
    pieces = [bytes([i]) for i in range(256)] + [b"re", b"de", b"def", b"  ", b"return", b"<|"]
    lines = [f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(pieces)]
    path = folder / "x.tiktoken"
    path.write_text("\n".join(lines) + "\n")
    return path


def make(kind: str, folder: Path) -> Tokenizer:
    if kind == "bpe":
        return bpe()
    path: object = ""
    if kind == "json":
        path = write_json(folder, normalizer={"type": "NFC"})
    if kind == "tiktoken":
        pytest.importorskip("tiktoken")
        path = write_ranks(folder)
    return tokenizers.create(config(kind, path))


KINDS = ["bytes", "bpe", "json", "tiktoken"]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_ledger_and_injection(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    letters = [chr(i) for i in range(0x3000) if unicodedata.category(chr(i)) != "Cs"]
    noise = "".join(random.Random(0).choices(letters, k=2000))
    for text in [*TEXTS, noise]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.end_of_text not in ids
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    batch = tokenizer.encode_batch(TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    end = [tokenizer.end_of_text]
    assert tokenizer.decode([*end, *tokenizer.encode("ab"), *end]) == "ab"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    path = tmp_path / "home.json"
    tokenizer.save(path)
    again = tokenizers.load(path)
    assert again.sha256 == tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert again.end_of_text == tokenizer.end_of_text
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)
    assert not list(tmp_path.glob("*.tmp*"))


def test_known_ids(tmp_path: Path) -> None:
    assert make("bytes", tmp_path).encode("aé") == [97, 0xC3, 0xA9]
    assert make("bytes", tmp_path).end_of_text == 256
    ranks = make("tiktoken", tmp_path)
    assert ranks.encode("def  x") == [258, 32, 32, 120]  # GPT-2's pattern splits the two spaces
    assert ranks.vocab_size == 263
    assert ranks.end_of_text == 262


def test_bpe_is_deterministic_and_may_be_smaller() -> None:
    assert bpe().sha256 == bpe().sha256
    assert bpe().vocab_size == 300
    assert bpe(290).vocab_size == 290
    assert 257 <= bpe(5000).vocab_size < 5000
    no_text = tokenizers.create(config("bpe"), [])
    assert no_text.vocab_size == 257
    assert no_text.decode(no_text.encode(TEXTS[1])) == TEXTS[1]


def test_vocab_size_must_hold_the_tokenizer(tmp_path: Path) -> None:
    path = write_json(tmp_path)
    message = "vocab_size=280 is below the tokenizer's 300 ids; set it to at least 300"
    with pytest.raises(UserError, match=message):
        tokenizers.create(config("json", path, vocab_size=280))
    assert tokenizers.create(config("json", path, vocab_size=300)).vocab_size == 300


def test_settings_that_change_corpus_text_are_taken_out(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    path = write_json(tmp_path, truncation=truncation, post_processor=template)
    # The file itself truncates and adds a token.
    assert hf.Tokenizer.from_file(str(path)).encode("abcdef").ids[0] == 0
    tokenizer = tokenizers.create(config("json", path))
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"added_tokens": [], "model": None}, "not a json tokenizer"),
        ({"model": []}, "not a json tokenizer"),
        ({"normalizer": "NFC"}, "not a json tokenizer"),
        ({"normalizer": {"type": "Sequence"}}, "not a json tokenizer"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 1, "<|endoftext|>": 0}, "merges": []}},
            "byte-level",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []},
            "no end-of",
        ),
    ],
)
def test_bad_json_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        tokenizers.create(config("json", write_json(tmp_path, **changes)))
    assert "\n" not in str(caught.value)


def added(content: str, **changes: object) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 300, "content": content} | flags | changes


def byte_level(**changes: object) -> dict[str, object]:
    plain = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel"} | plain | changes


LOSSY: dict[str, tuple[dict[str, object], str]] = {
    "case": (
        {"normalizer": {"type": "Lowercase"}},
        "@ABCDEF.* comes back from its tokens as .*@abcdef",
    ),
    "accents": ({"normalizer": {"type": "StripAccents"}}, "comes back from its tokens as"),
    "replaced": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "~"}, "content": "^"}},
        r"xyz\{\|\}~.* as .*xyz\{\|\}\^",
    ),
    "nested": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFC"},
                    {"type": "Strip", "strip_left": True, "strip_right": True},
                ],
            }
        },
        "comes back from its tokens as",
    ),
    "stripped in front": (
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}},
        "' don.* as 'don",
    ),
    "a string of its own": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "q``q"}, "content": "q"}},
        "q``q",
    ),
    "prefix": ({"pre_tokenizer": byte_level(add_prefix_space=True)}, "as ' don"),
    "removed": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"String": "\t"},
                        "behavior": "Removed",
                        "invert": False,
                    },
                    byte_level(),
                ],
            }
        },
        r"\\t",
    ),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_tokenizer_json_is_refused(tmp_path: Path, name: str) -> None:
    changes, words = LOSSY[name]
    with pytest.raises(UserError, match=words) as caught:
        tokenizers.create(config("json", write_json(tmp_path, **changes)))
    assert "a lossy tokenizer; use a byte-level one" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_an_added_token_that_takes_blanks_is_lossy(tmp_path: Path, side: str) -> None:
    path = write_json(tmp_path)
    settings = json.loads(path.read_text())
    for flags in ({}, {side: True}):
        settings["added_tokens"] = [*settings["added_tokens"][:1], added("<gap>", **flags)]
        path.write_text(json.dumps(settings))
        if not flags:
            assert tokenizers.create(config("json", path)).encode(" <gap> ").count(300) == 1
            continue
        with pytest.raises(UserError, match=r"<gap>.* comes back from its tokens as .*<gap>"):
            tokenizers.create(config("json", path))


def test_lost_compares_bytes_not_their_number() -> None:
    tokenizer = tokenizers.create(config("bytes"))
    assert tokenizer.lost("abc", np.array([97, 98, 99])) == ""
    assert "'abc' comes back from its tokens as 'abd'" in tokenizer.lost(
        "abc", np.array([97, 98, 100])
    )
    assert "'abc' comes back from its tokens as 'ab'" in tokenizer.lost("abc", np.array([97, 98]))
    assert "lossy" in tokenizer.lost("abc", np.array([97, 256, 98, 99]))


def model(path: Path, **changes: object) -> dict[str, object]:
    return {"model": json.loads(path.read_text())["model"] | changes}


def test_bpe_dropout_is_ignored(tmp_path: Path) -> None:
    """BPE dropout is removed from a file and ignored in tokenizers saved before it was removed."""
    plain = write_json(tmp_path)
    made = tokenizers.create(config("json", plain))
    settings = json.loads(plain.read_text()) | model(plain, dropout=0.5)
    plain.write_text(json.dumps(settings))
    dropped = tokenizers.create(config("json", plain))
    assert dropped.sha256 == made.sha256
    old = Tokenizer("tokenizers", json.dumps(settings))
    assert all(old.encode(text) == made.encode(text) for text in TEXTS for _ in range(4))


def test_normal_forms_in_a_sequence_are_taken_out(tmp_path: Path) -> None:
    forms = [{"type": "NFKC"}, {"type": "Sequence", "normalizers": [{"type": "NFD"}]}]
    path = write_json(tmp_path, normalizer={"type": "Sequence", "normalizers": forms})
    tokenizer = tokenizers.create(config("json", path))
    assert tokenizer.decode(tokenizer.encode("e\u0301 é ﬁ")) == "e\u0301 é ﬁ"
    assert tokenizer.sha256 == tokenizers.create(config("json", write_json(tmp_path))).sha256


@pytest.mark.parametrize("far", [70, 290_000_000])
def test_two_tokens_with_one_id_and_an_id_far_out_are_refused(tmp_path: Path, far: int) -> None:
    path = write_json(tmp_path)
    settings = json.loads(path.read_text())
    settings["model"]["vocab"]["xq"] = far
    path.write_text(json.dumps(settings))
    words = "an id of 290,000,000" if far > 70 else r"tokens '.+' and '.+' have one id, 70"
    with pytest.raises(UserError, match=words):
        tokenizers.create(config("json", path))


def test_an_added_token_with_a_taken_id_is_refused(tmp_path: Path) -> None:
    """The `tokenizers` package would give it another id."""
    end = json.loads(write_json(tmp_path).read_text())["added_tokens"][0]
    for taken in (end["id"], 40):
        path = write_json(tmp_path, added_tokens=[end, added("<pad>", id=taken)])
        with pytest.raises(UserError, match=f"tokens '.+' and '<pad>' have one id, {taken}"):
            tokenizers.create(config("json", path))


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_markers_of_word_parts_are_refused(tmp_path: Path, key: str) -> None:
    """The `tokenizers` package panics on some of them and prints a trace on stderr."""
    model = json.loads(write_json(tmp_path).read_text())["model"] | {key: "##"}
    with pytest.raises(UserError, match=f"its {key} is '##'; byte-level tokens have none"):
        tokenizers.create(config("json", write_json(tmp_path, model=model)))


def test_a_million_blanks_are_encoded(tmp_path: Path) -> None:
    """tiktoken panics on them; any other text is split as tiktoken splits it."""
    pytest.importorskip("tiktoken")
    tokenizer = make("tiktoken", tmp_path)
    for text in (
        " " * 1_000_000,
        "x" + "\n\u3000\u00a0" * 400_000 + "y",
        " " * 520_000 + "\n" * 9000,
    ):
        ids = tokenizer.encode_batch(["a", text, "b"])
        assert [len(ids[0]), len(ids[2])] == [1, 1]
        assert tokenizer.lost(text, ids[1]) == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("IQ== 0\nIg==\n", "line 2 is not 'base64 rank'"),
        ("IQ== 0\n@@@@ 1\n", "not a tiktoken tokenizer"),
        ("IQ== 0\nIg== 7\n", "its 2 ranks are not 0..1"),
        ("IQ== 0\n", "242 single bytes are missing"),
    ],
)
def test_bad_ranks_are_refused(tmp_path: Path, content: str, words: str) -> None:
    pytest.importorskip("tiktoken")
    (tmp_path / "x.tiktoken").write_text(content)
    with pytest.raises(UserError, match=words):
        tokenizers.create(config("tiktoken", tmp_path / "x.tiktoken"))


def test_bad_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"No such file.*set data.tokenizer.path"):
        tokenizers.create(config("json", tmp_path / "none.json"))
    for content in (
        '{"kind": "bytes"',
        '{"kind": "bytes"}',
        '{"kind": "new", "payload": ""}',
        "[]",
    ):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError, match="is not a saved tokenizer"):
            tokenizers.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("[" * 100_000)
    for path in (tmp_path / "t.json", tmp_path / "a\0b", tmp_path / ("long" * 2000), tmp_path):
        with pytest.raises(UserError, match="tokenizer"):
            tokenizers.load(path)
        with pytest.raises(UserError, match="tokenizer"):
            tokenizers.create(config("json", path))
    path = write_ranks(tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r" -m pip install -c .*\[data\]'"):
        tokenizers.create(config("tiktoken", path))


@pytest.fixture
def shared() -> Path:
    folder = os.environ.get("ESPALIER_SHARED_DATA")
    if not folder:
        pytest.skip("ESPALIER_SHARED_DATA names no folder with published tokenizers")
    return Path(folder, "tokenizers")


@pytest.mark.parametrize(
    ("kind", "name", "vocab_size", "ids"),
    [
        ("tiktoken", "gpt2.tiktoken", 50257, [15496, 995]),
        ("json", "gpt-neox-olmo.json", 50280, [12092, 1533]),
        ("json", "mixed_bpe32768.json", 32768, None),
    ],
)
def test_published(
    shared: Path, kind: str, name: str, vocab_size: int, ids: list[int] | None
) -> None:
    tokenizer = tokenizers.create(config(kind, shared / name, vocab_size=60000))
    assert tokenizer.vocab_size == vocab_size
    if ids is not None:
        assert tokenizer.encode("Hello world") == ids
    for text in TEXTS:
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded) == text
        assert tokenizer.token_bytes[encoded].sum() == len(text.encode())
        assert tokenizer.end_of_text not in encoded
