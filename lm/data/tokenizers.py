"""Tokenizers: text <-> ids with exact bytes per id, kept in one file of any kind.

    bytes      id = byte, 256 = end of text
    tokenizers byte-level BPE of the `tokenizers` package, trained here or from a tokenizer.json
    tiktoken   byte-level BPE from a file of ranks, split by a published pattern

All are lossless: the bytes of a document's ids are its UTF-8 bytes, which preparation compares
document by document. So a Unicode normal form (NFC, ...) in a tokenizer.json is taken out: it
changes nothing on normalised text and loses bytes elsewhere. So is BPE dropout, under which a text
has other ids each time. Two tokens of one id are refused. Encoding takes text literally:
"<|endoftext|>" inside a document is encoded by its letters and never as the special id.

A document ends with the end of text, the one token that a model writes and never reads. With `bos`
it also begins with a token, which is read and never written: then there is a distribution of first
tokens, and texts can be continued from nothing. It may be the end of text itself (GPT-2's custom).

File: JSON {"kind", "payload"} and the options that are not the usual; the tokenizer's sha256 is
that of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf

from lm import files
from lm.config import TokenizerConfig, UserError
from lm.data import codecs
from lm.data.codecs import END_OF_TEXT, Codec, Options

_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# What a lossy tokenizer.json changes: case, accents, compatibility forms, blanks, control letters.
_PROBE = (
    "don't "
    + "".join(map(chr, range(32, 127)))
    + "\t\r\n\n  Straße É e\u0301 ﬁ Å Ǆ 日本 한글 \u200d 👩‍🚀"
    "\x00\x7f " + END_OF_TEXT + "  "
)


class Tokenizer:
    """Text <-> ids. `named`: ids of end and start of text by name; `token_bytes[id]`: UTF-8 bytes
    an id stands for, 0 for these two; `added`: tokens that are found in a text before it is split.
    """

    def __init__(self, kind: str, payload: str, options: Options = Options()):  # noqa: B008
        self.kind, self.options = kind, options
        usual = Options()._asdict()
        named = {k: x for k, x in options._asdict().items() if x != usual[k]}
        self._content = json.dumps({"kind": kind, "payload": payload, **named}) + "\n"
        self._codec: Codec = codecs.KINDS[kind](payload, options)
        self.sha256 = hashlib.sha256(self._content.encode()).hexdigest()
        self.vocab_size = self._codec.vocab_size
        self.end_of_text, self.bos = self._codec.end_of_text, self._codec.bos
        self.named = self._codec.named
        self.token_bytes = self._codec.token_bytes
        self.added = self._codec.added

    @property
    def start(self) -> list[int]:
        """What every document begins with: [bos], or nothing."""
        return [] if self.bos is None else [self.bos]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end of text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, on all cores."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; start and end of text give nothing, and bytes that are not UTF-8 become
        U+FFFD.
        """
        return self._codec.decode_bytes([int(i) for i in ids]).decode("utf-8", errors="replace")

    def lost(self, text: str, ids: np.ndarray) -> str:
        """What is wrong where the bytes of `ids` are not those of the text they encode, else ""."""
        wanted, found = text.encode(), self._codec.decode_bytes(ids.tolist())
        if found == wanted and not np.any(np.isin(ids, [self.end_of_text, *self.start])):
            return ""
        at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
        place = max(0, (min(len(wanted), len(found)) if at is None else at) - 8)
        shown = [str(x[place : place + 24], "utf-8", "replace") for x in (wanted, found)]
        return (
            f"{shown[0]!r} comes back from its tokens as {shown[1]!r}: a lossy tokenizer; use a "
            "byte-level one without normalizer, prefix space or tokens that strip (lstrip, rstrip)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the one file that `load` reads, atomically."""
        files.replace(Path(path), self._content)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote, of whatever kind."""
    advice = "restore the file, or prepare again if it lies among prepared data"
    content = _read(path, advice)
    with files.one_line(f"{path} is not a saved tokenizer", advice):
        saved = json.loads(content)
        return Tokenizer(saved.pop("kind"), saved.pop("payload"), Options(**saved))


def create(config: TokenizerConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a config; only `bpe` reads `texts`, to be trained on them.

    Raises:
      UserError: the file is missing, malformed, not byte-level, or has more ids than `vocab_size`.
    """
    options = Options(config.pattern, config.end_of_text, config.bos)
    if config.kind in ("bpe", "bytes"):
        with files.one_line(f"data.tokenizer.kind={config.kind!r}"):
            made = config.kind == "bpe" and _train(texts, config.vocab_size)
            tokenizer = Tokenizer("tokenizers" if made else "bytes", made or "", options)
    else:
        kind = {"json": "tokenizers", "tiktoken": "tiktoken"}[config.kind]
        path = os.path.expanduser(config.path)
        content = _read(path, "set data.tokenizer.path")
        with files.one_line(f"data.tokenizer.path={config.path!r} is no {config.kind} tokenizer"):
            patterns: list[str] = []
            if kind == "tokenizers":
                settings = json.loads(content)
                patterns, content = _patterns(settings), _lossless(settings)
            tokenizer = Tokenizer(kind, content, options)
            strings = [*tokenizer.added, *patterns]
            text = _PROBE + "".join(f"a  {string}  " for string in strings)
            # With a space in front, which some drop, and without, where others add one.
            texts = [text, f" {text}"]
            lost = [*filter(None, map(tokenizer.lost, texts, tokenizer.encode_batch(texts)))]
        if lost:
            raise UserError(f"data.tokenizer.path={config.path!r}: {lost[0]}")
    check_vocab_size(tokenizer, config)
    return tokenizer


def check_vocab_size(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """The model's vocabulary must hold every id; a smaller tokenizer (a tiny corpus) is fine."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size={config.vocab_size} is below the tokenizer's "
            f"{tokenizer.vocab_size} ids; set it to at least {tokenizer.vocab_size}"
        )


def _train(texts: Iterable[str], vocab_size: int) -> str:
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _lossless(settings: dict[str, Any]) -> str:
    """A tokenizer.json for corpus text: whole documents, no padding, no Unicode normal form, no
    dropout.
    """
    settings = settings | {"truncation": None, "padding": None, "post_processor": None}
    if settings.get("normalizer"):
        settings["normalizer"] = _without_normal_forms(settings["normalizer"])
    model = settings["model"]
    if model.get("dropout"):
        model["dropout"] = None
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):  # their reader may panic
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r}; byte-level tokens have none")
    _check_added(settings.get("added_tokens") or (), model["vocab"])
    return json.dumps(settings)


def _check_added(tokens: Sequence[dict[str, Any]], vocab: Any) -> None:
    """Their reader gives an added token whose id is taken another, without a word."""
    names = {i: token for token, i in vocab.items()} if isinstance(vocab, dict) else {}
    for token in tokens:
        other = names.setdefault(token["id"], token["content"])
        if other != token["content"]:
            raise ValueError(
                f"tokens {other!r} and {token['content']!r} have one id, {token['id']}"
            )


def _patterns(settings: Mapping[str, Any]) -> list[str]:
    """The strings, not regular expressions, that a tokenizer.json replaces or splits at."""
    found, pending = [], [settings.get("normalizer"), settings.get("pre_tokenizer")]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            found += [node["String"]] if isinstance(node.get("String"), str) else []
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    return found


def _without_normal_forms(normalizer: Any) -> Any:
    if normalizer["type"] in _NORMAL_FORMS:
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    kept = [x for x in map(_without_normal_forms, normalizer["normalizers"]) if x]
    return normalizer | {"normalizers": kept} if kept else None


def _read(path: str | os.PathLike[str], advice: str) -> str:
    with files.one_line(f"cannot read the tokenizer {path}", advice):
        return Path(path).read_text(encoding="utf-8")
