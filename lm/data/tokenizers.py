"""Tokenizers: text <-> ids, with the exact bytes of every id; every kind is saved in one file.

    bytes      id = byte, 256 = end of text
    tokenizers byte-level BPE of the `tokenizers` package, trained here or from a tokenizer.json
    tiktoken   byte-level BPE from a file of ranks, split by a published pattern

All are lossless: the bytes of a document's ids are its UTF-8 bytes, and preparation checks this for
every document. So two things are removed from a tokenizer.json. A Unicode normal form (NFC, ...)
changes nothing in normalized text and loses bytes elsewhere. BPE dropout would give a text other
ids each time. Two tokens with the same id are refused. Encoding takes text literally:
"<|endoftext|>" inside a document is encoded by its characters and never as the special id.

A document ends with the end of text, the one token that a model predicts but never reads. With
`bos` a document also begins with a token, which the model reads but never predicts. Then there is a
distribution of first tokens, and an empty prompt can be continued. The bos may be the end of text
itself (GPT-2's custom).

The file is JSON: {"kind", "payload"}, and the options that differ from the defaults. The
tokenizer's sha256 is that of the file.
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
# What a lossy tokenizer.json may change: case, accents, compatibility forms, blanks, controls.
_PROBE = (
    "don't "
    + "".join(map(chr, range(32, 127)))
    + "\t\r\n\n  Straße É e\u0301 ﬁ Å Ǆ 日本 한글 \u200d 👩‍🚀"
    "\x00\x7f " + END_OF_TEXT + "  "
)


class Tokenizer:
    """Text <-> ids. `named`: ids of end and start of text by name. `token_bytes[id]`: number of
    UTF-8 bytes that an id stands for, 0 for these two. `added`: tokens found in a text before
    splitting.
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
        """The ids that every document begins with: [bos], or nothing."""
        return [] if self.bos is None else [self.bos]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end of text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, on all cores."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Start and end of text are dropped, and bytes that are not UTF-8 become
        U+FFFD.
        """
        return self._codec.decode_bytes([int(i) for i in ids]).decode("utf-8", errors="replace")

    def lost(self, text: str, ids: np.ndarray) -> str:
        """What is wrong if `ids` do not decode to the bytes of `text`, else ""."""
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
        """Writes the file that `load` reads, atomically."""
        files.replace(Path(path), self._content)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer of any kind that `Tokenizer.save` wrote."""
    advice = "restore the file, or prepare again if it lies among prepared data"
    content = _read(path, advice)
    with files.one_line(f"{path} is not a saved tokenizer", advice):
        saved = json.loads(content)
        return Tokenizer(saved.pop("kind"), saved.pop("payload"), Options(**saved))


def create(config: TokenizerConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a config. `bpe` is trained on `texts`; the others ignore them.

    Raises:
      UserError: the file is missing, malformed or not byte-level, or has more ids than
        `vocab_size`.
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
        where = f"data.tokenizer.path={config.path!r}"
        with files.one_line(f"{where} is not a {config.kind} tokenizer"):
            patterns: list[str] = []
            if kind == "tokenizers":
                settings = json.loads(content)
                patterns, content = _patterns(settings), _lossless(settings)
            tokenizer = Tokenizer(kind, content, options)
            strings = [*tokenizer.added, *patterns]
            text = _PROBE + "".join(f"a  {string}  " for string in strings)
            # With a leading space, which some drop, and without one, where some add it.
            texts = [text, f" {text}"]
            lost = [*filter(None, map(tokenizer.lost, texts, tokenizer.encode_batch(texts)))]
        if lost:
            raise UserError(f"{where}: {lost[0]}")
    check_vocab_size(tokenizer, config)
    return tokenizer


def check_vocab_size(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """The model's vocabulary must hold every id. A smaller tokenizer (of a tiny corpus) is fine."""
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
    """A tokenizer.json changed to encode whole documents, without padding, Unicode normal form or
    dropout.
    """
    settings = settings | {"truncation": None, "padding": None, "post_processor": None}
    if settings.get("normalizer"):
        settings["normalizer"] = _without_normal_forms(settings["normalizer"])
    model = settings["model"]
    if model.get("dropout"):
        model["dropout"] = None
    # `tokenizers` may panic on these keys.
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r}; byte-level tokens have none")
    _check_added(settings.get("added_tokens") or (), model["vocab"])
    return json.dumps(settings)


def _check_added(tokens: Sequence[dict[str, Any]], vocab: Any) -> None:
    """Refuses two tokens with one id: `tokenizers` would silently give the added one another id."""
    names = {i: token for token, i in vocab.items()} if isinstance(vocab, dict) else {}
    for token in tokens:
        other = names.setdefault(token["id"], token["content"])
        if other != token["content"]:
            raise ValueError(
                f"tokens {other!r} and {token['content']!r} have one id, {token['id']}"
            )


def _patterns(settings: Mapping[str, Any]) -> list[str]:
    """The literal strings, not regular expressions, that a tokenizer.json replaces or splits at."""
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
