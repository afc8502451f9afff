"""Our tokenizers as a tokenizer.json of the `tokenizers` package.

    bytes       byte-level BPE without merges: 256 letters for bytes, ids as ours, and end of text
    tokenizers  is one
    tiktoken    byte-level BPE; its merges are every cut of a token into two tokens, in the order
                of ranks, and a word that is a token is taken whole, as tiktoken does

Theirs reads "<|endoftext|>" inside a text as the special token; ours encodes its letters.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers as hf

from lm.data.tokenizers import END_OF_TEXT, Tokenizer, byte_alphabet


def payload(path: Path) -> str:
    """What a saved tokenizer of ours was made from."""
    return json.loads(path.read_text(encoding="utf-8"))["payload"]


def to_json(tokenizer: Tokenizer, content: str) -> str:
    """tokenizer.json for a tokenizer of ours and its payload."""
    if tokenizer.kind == "tokenizers":
        return content
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    if tokenizer.kind == "bytes":
        return _byte_level({letters[i]: i for i in range(256)}, [], is_split=False)
    ranks = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks["".join(letters[byte] for byte in base64.b64decode(token))] = int(rank)
    return _byte_level(ranks, _merges(ranks), is_split=True)


def config(tokenizer: Tokenizer, text: str, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json beside a tokenizer.json `text`."""
    end = hf.Tokenizer.from_str(text).id_to_token(tokenizer.end_of_text)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }


def first_ids(path: Path) -> list[int]:
    """What the tokenizer of transformers puts before every text: tokenizer.json does."""
    plain, whole = (
        hf.Tokenizer.from_file(str(path)).encode("a", add_special_tokens=special).ids
        for special in (False, True)
    )
    places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: places[0]] if places else []


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], *, is_split: bool) -> str:
    """`is_split`: by GPT-2's pattern, which that of our tiktoken kind is."""
    made = hf.Tokenizer(hf.models.BPE(vocab, merges, ignore_merges=is_split))
    made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_split)
    made.decoder = hf.decoders.ByteLevel()
    made.add_special_tokens([hf.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return made.to_str()


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for token, rank in ranks.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(rank, ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    return [(a, b) for *_, a, b in sorted(found)]
