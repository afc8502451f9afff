"""Tokenizers: text <-> ids with exact bytes per id, kept in one file of any kind.

    bytes      id = byte, 256 = end of text
    tokenizers byte-level BPE of the `tokenizers` package, trained here or from a tokenizer.json
    tiktoken   byte-level BPE from a file of ranks, split by GPT-2's pattern

All are lossless: the bytes of a document's ids are its UTF-8 bytes, which preparation compares
document by document. So a Unicode normal form (NFC, ...) in a tokenizer.json is taken out: it
changes nothing on normalised text and loses bytes elsewhere. So is BPE dropout, under which a text
has other ids each time. Two tokens of one id are refused. Encoding takes text literally:
"<|endoftext|>" inside a document is encoded by its letters and never as the special id.

File: JSON {"kind", "payload"}; the tokenizer's sha256 is that of the file.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers as hf

from lm import extras, files
from lm.config import TokenizerConfig, UserError

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}  # those that occur in text
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_MOST_IDS = 1 << 24  # of a tokenizer.json: an id far out would ask for that many parameters
_LONGEST_BLANK = 1 << 19  # letters of white space that tiktoken splits at once; 2^20 make it panic
# What a lossy tokenizer.json changes: case, accents, compatibility forms, blanks, control letters.
_PROBE = (
    "don't "
    + "".join(map(chr, range(32, 127)))
    + "\t\r\n\n  Straße É e\u0301 ﬁ Å Ǆ 日本 한글 \u200d 👩‍🚀"
    "\x00\x7f " + END_OF_TEXT + "  "
)


class Codec(Protocol):
    """What a kind of tokenizer must do; `Tokenizer` adds what all of them share."""

    vocab_size: int
    end_of_text: int
    token_bytes: np.ndarray
    added: Sequence[str]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class Tokenizer:
    """Text <-> ids. `token_bytes[id]`: UTF-8 bytes an id stands for, 0 for end of text; `added`:
    tokens that are found in a text before it is split.
    """

    def __init__(self, kind: str, payload: str):
        self.kind = kind
        self._content = json.dumps({"kind": kind, "payload": payload}) + "\n"
        self._codec = _CODECS[kind](payload)
        self.sha256 = hashlib.sha256(self._content.encode()).hexdigest()
        self.vocab_size = self._codec.vocab_size
        self.end_of_text = self._codec.end_of_text
        self.token_bytes = self._codec.token_bytes
        self.added = self._codec.added

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end of text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, on all cores."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; an end of text gives nothing, and bytes that are not UTF-8 become U+FFFD."""
        end = self.end_of_text
        return self._codec.decode_bytes([int(i) for i in ids if int(i) != end]).decode(
            "utf-8", errors="replace"
        )

    def lost(self, text: str, ids: np.ndarray) -> str:
        """What is wrong where the bytes of `ids` are not those of the text they encode, else ""."""
        wanted, found = text.encode(), self._codec.decode_bytes(ids.tolist())
        if found == wanted and not np.any(ids == self.end_of_text):
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
        return Tokenizer(saved["kind"], saved["payload"])


def create(config: TokenizerConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a config; only `bpe` reads `texts`, to be trained on them.

    Raises:
      UserError: the file is missing, malformed, not byte-level, or has more ids than `vocab_size`.
    """
    if config.kind == "bpe":
        tokenizer = Tokenizer("tokenizers", _train(texts, config.vocab_size))
    elif config.kind == "bytes":
        tokenizer = Tokenizer("bytes", "")
    else:
        kind = {"json": "tokenizers", "tiktoken": "tiktoken"}[config.kind]
        path = os.path.expanduser(config.path)
        content = _read(path, "set data.tokenizer.path")
        with files.one_line(f"data.tokenizer.path={config.path!r} is no {config.kind} tokenizer"):
            patterns: list[str] = []
            if kind == "tokenizers":
                settings = json.loads(content)
                patterns, content = _patterns(settings), _lossless(settings)
            tokenizer = Tokenizer(kind, content)
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


class _Bytes:
    vocab_size = 257
    end_of_text = 256
    added = ()

    def __init__(self, payload: str):
        del payload  # the alphabet is the same in every file
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        found = np.asarray(ids, np.int64)
        return found[found < 256].astype(np.uint8).tobytes()


class _HuggingFace:
    def __init__(self, payload: str):
        self._tokenizer = hf.Tokenizer.from_buffer(payload.encode())  # ValueError, unlike from_str
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        if isinstance(self._tokenizer.model, hf.models.BPE):
            self._tokenizer.model.dropout = None
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        end = next((name for name in _END_NAMES if name in ids), None)
        if end is None:
            raise ValueError(f"it has no end-of-text token (one of {', '.join(_END_NAMES)})")
        missing = {
            letter for letter, byte in byte_alphabet().items() if byte in _UTF8_BYTES
        } - ids.keys()
        if missing:
            raise ValueError(f"it is not byte-level: {len(missing)} single bytes are missing")
        if max(ids.values()) >= _MOST_IDS:
            raise ValueError(f"it has an id of {max(ids.values()):,}; {_MOST_IDS:,} are the most")
        if len(names := {i: token for token, i in ids.items()}) < len(ids):
            token = next(token for token, i in ids.items() if names[i] != token)
            raise ValueError(
                f"tokens {token!r} and {names[ids[token]]!r} have one id, {ids[token]}"
            )
        added = {
            i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        self.added = tuple(added.values())
        self.vocab_size = max(ids.values()) + 1
        self.end_of_text = ids[end]
        self._pieces: list[bytes] = [b""] * self.vocab_size
        alphabet = byte_alphabet()
        for token, i in ids.items():
            literal = i in added or not all(letter in alphabet for letter in token)
            self._pieces[i] = (
                token.encode() if literal else bytes(alphabet[letter] for letter in token)
            )
        self._pieces[self.end_of_text] = b""
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encoded]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[i] for i in ids if i < self.vocab_size)


class _Tiktoken:
    added = ()

    def __init__(self, payload: str):
        try:
            tiktoken = importlib.import_module("tiktoken")
        except ImportError as error:
            raise UserError(
                f"a .tiktoken tokenizer needs tiktoken; {extras.command('data')}"
            ) from error
        ranks = {}
        for number, line in enumerate(payload.splitlines(), start=1):
            fields = line.split()
            if len(fields) != 2:
                raise ValueError(f"line {number} is not 'base64 rank'")
            ranks[base64.b64decode(fields[0], validate=True)] = int(fields[1])
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"its {len(ranks)} ranks are not 0..{len(ranks) - 1}")
        missing = [byte for byte in _UTF8_BYTES if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"it is not byte-level: {len(missing)} single bytes are missing")
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._pieces = [*sorted(ranks, key=ranks.__getitem__), b""]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
        self._encoding = tiktoken.Encoding(
            "espalier",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [_cut_blanks(text) for text in texts]
        flat, threads = [part for cut in parts for part in cut], os.cpu_count() or 1
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=threads))
        return [np.array([i for _ in cut for i in next(encoded)], np.int32) for cut in parts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[i] for i in ids if i < self.vocab_size)


_CODECS: dict[str, Any] = {"bytes": _Bytes, "tokenizers": _HuggingFace, "tiktoken": _Tiktoken}


def _cut_blanks(text: str) -> list[str]:
    """A text in parts whose runs of white space tiktoken can split."""
    if len(text) <= _LONGEST_BLANK:
        return [text]
    runs = [match.span() for match in re.finditer(r"\s+", text)]
    cuts = [i for a, b in runs for i in range(a + _LONGEST_BLANK, b, _LONGEST_BLANK)]
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


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


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level BPE: printable Latin-1 is itself, the rest U+0100 onwards."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def _read(path: str | os.PathLike[str], advice: str) -> str:
    with files.one_line(f"cannot read the tokenizer {path}", advice):
        return Path(path).read_text(encoding="utf-8")
