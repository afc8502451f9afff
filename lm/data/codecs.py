"""Codecs: how each kind of tokenizer encodes; lm/data/tokenizers.py adds what all of them share.

bytes      id = byte, 256 = end of text
tokenizers byte-level BPE of the `tokenizers` package
tiktoken   byte-level BPE from a file of ranks, split by a published pattern
"""

from __future__ import annotations

import base64
import functools
import importlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers as hf

from lm import extras
from lm.config import UserError, nearest

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}  # bytes that UTF-8 text has
_MOST_IDS = 1 << 24  # largest vocabulary: the model has embeddings for all ids up to the largest
_LONGEST_BLANK = 1 << 19  # characters of white space for tiktoken to split at once; 2^20 panic

# As published in openai_public.py of tiktoken up to 0.7. Later versions write the same patterns in
# a faster form, which other programs cannot read. Llama 3 splits text like cl100k_base.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k_base": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"""
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
    "o200k_base": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
        r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}
# Special tokens with published ids, by pattern and number of ranks. p50k_base leaves 50256 free for
# its end of text; cl100k_base does not use 100256. Llama 3 has 128,000 ranks.
_PUBLISHED = {
    ("gpt2", 50280): {END_OF_TEXT: 50256},
    ("cl100k_base", 100256): {END_OF_TEXT: 100257, "<|endofprompt|>": 100276},
    ("o200k_base", 199998): {
        "<|startoftext|>": 199998,
        END_OF_TEXT: 199999,
        "<|endofprompt|>": 200018,
    },
    ("cl100k_base", 128000): {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|eot_id|>": 128009,
    },
}


class Options(NamedTuple):
    """`pattern`: for tiktoken, a key of PATTERNS. `end_of_text`, `bos`: names of tokens. An empty
    name means the tokenizer's usual end of text, and no bos.
    """

    pattern: str = "gpt2"
    end_of_text: str = ""
    bos: str = ""


class Codec:
    """One kind of tokenizer. `end_of_text`, `bos`: ids; `bos` is None if texts have no start token.
    `named`: both ids by name. `token_bytes[id]`: number of UTF-8 bytes that an id stands for.
    `added`: tokens that are found in a text before it is split.
    """

    added: Sequence[str] = ()

    def __init__(self, pieces: list[bytes], ids: Mapping[str, int], options: Options):
        """`pieces[id]`: the bytes of an id. `ids`: name -> id of tokens that may end or begin a
        text.
        """
        end = _checked(ids, options)
        self.named = {name: ids[name] for name in (end, options.bos) if name}
        self.end_of_text = ids[end]
        self.bos = ids[options.bos] if options.bos else None
        self._pieces = pieces
        for i in {self.end_of_text, self.bos} - {None}:
            self._pieces[i] = b""
        self.vocab_size = len(pieces)
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[i] for i in ids if i < self.vocab_size)


def _checked(ids: Mapping[str, int], options: Options) -> str:
    """The name of the token that ends texts.

    Raises:
      ValueError: there is none, or an option names a token that does not exist.
    """
    end = options.end_of_text or next((name for name in _END_NAMES if name in ids), None)
    if end is None:
        raise ValueError(
            f"it has no end-of-text token (one of {', '.join(_END_NAMES)}); name one, "
            "data.tokenizer.end_of_text"
        )
    for key, name in {"end_of_text": end, "bos": options.bos}.items():
        if name and name not in ids:
            raise ValueError(f"it has no token data.tokenizer.{key}={name!r}; {nearest(name, ids)}")
    return end


class _Bytes(Codec):
    def __init__(self, payload: str, options: Options):
        del payload  # the alphabet is the same in every file
        super().__init__([*(bytes([i]) for i in range(256)), b""], {END_OF_TEXT: 256}, options)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        found = np.asarray(ids, np.int64)
        return found[found < 256].astype(np.uint8).tobytes()


class _HuggingFace(Codec):
    def __init__(self, payload: str, options: Options):
        self._tokenizer = hf.Tokenizer.from_buffer(payload.encode())  # ValueError, unlike from_str
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        if isinstance(self._tokenizer.model, hf.models.BPE):
            self._tokenizer.model.dropout = None
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        _checked(ids, options)
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
        pieces = [b""] * (max(ids.values()) + 1)
        alphabet = byte_alphabet()
        for token, i in ids.items():
            literal = i in added or not all(letter in alphabet for letter in token)
            pieces[i] = token.encode() if literal else bytes(alphabet[letter] for letter in token)
        super().__init__(pieces, ids, options)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encoded]


class _Tiktoken(Codec):
    def __init__(self, payload: str, options: Options):
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
        special = _PUBLISHED.get((options.pattern, len(ranks)), {END_OF_TEXT: len(ranks)})
        free = {i for i in special.values() if i < max(ranks.values(), default=0)}
        places = [i for i in range(len(ranks) + len(free)) if i not in free]
        if sorted(ranks.values()) != places:
            raise ValueError(f"its {len(ranks)} ranks are not 0..{len(ranks) - 1}")
        missing = [byte for byte in _UTF8_BYTES if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"it is not byte-level: {len(missing)} single bytes are missing")
        pieces = [b""] * (max([*ranks.values(), *special.values()]) + 1)
        for token, i in ranks.items():
            pieces[i] = token
        super().__init__(pieces, special, options)
        self._encoding = tiktoken.Encoding(
            "espalier",
            pat_str=PATTERNS[options.pattern],
            mergeable_ranks=ranks,
            special_tokens=special,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [_cut_blanks(text) for text in texts]
        flat, threads = [part for cut in parts for part in cut], os.cpu_count() or 1
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=threads))
        return [np.array([i for _ in cut for i in next(encoded)], np.int32) for cut in parts]


KINDS: dict[str, Any] = {"bytes": _Bytes, "tokenizers": _HuggingFace, "tiktoken": _Tiktoken}


def _cut_blanks(text: str) -> list[str]:
    """A text cut so that tiktoken can split every run of white space in it."""
    if len(text) <= _LONGEST_BLANK:
        return [text]
    runs = [match.span() for match in re.finditer(r"\s+", text)]
    cuts = [i for a, b in runs for i in range(a + _LONGEST_BLANK, b, _LONGEST_BLANK)]
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 is itself, the rest is from U+0100
    on.
    """
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
