"""Our tokenizers as a tokenizer.json of the `tokenizers` package.

    bytes       byte-level BPE without merges: 256 letters for bytes, with our ids, and end of text
    tokenizers  already is one
    tiktoken    byte-level BPE. Its merges are all ways to cut a token into two tokens, in the order
                of ranks. A word that is a token is taken whole, as in tiktoken

That package reads "<|endoftext|>" inside a text as the special token; ours encodes its characters.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers as hf

from lm.data.codecs import PATTERNS, byte_alphabet
from lm.data.tokenizers import Tokenizer


def payload(path: Path) -> str:
    """The payload of a saved tokenizer of ours."""
    return json.loads(path.read_text(encoding="utf-8"))["payload"]


def to_json(tokenizer: Tokenizer, content: str) -> str:
    """tokenizer.json for a tokenizer of ours and its payload; it puts our bos before texts."""
    text = _to_json(tokenizer, content)
    if tokenizer.bos is None:
        return text
    made = hf.Tokenizer.from_str(text)
    name = made.id_to_token(tokenizer.bos)
    template = f"{name}:0 $A:0"
    made.post_processor = hf.processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.bos)]
    )
    return made.to_str()


def _to_json(tokenizer: Tokenizer, content: str) -> str:
    if tokenizer.kind == "tokenizers":
        return content
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    if tokenizer.kind == "bytes":
        return _byte_level({letters[i]: i for i in range(256)}, [], tokenizer)
    ranks = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks["".join(letters[byte] for byte in base64.b64decode(token))] = int(rank)
    return _byte_level(ranks, _merges(ranks), tokenizer)


def config(tokenizer: Tokenizer, text: str, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json for a tokenizer.json with the content `text`."""
    name = hf.Tokenizer.from_str(text).id_to_token
    bos = {} if tokenizer.bos is None else {"bos_token": name(tokenizer.bos)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": name(tokenizer.end_of_text),
        **bos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }


def first_ids(path: Path) -> list[int]:
    """The ids that tokenizer.json, and so the tokenizer of transformers, puts before every text."""
    plain, whole = (
        hf.Tokenizer.from_file(str(path)).encode("a", add_special_tokens=special).ids
        for special in (False, True)
    )
    places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: places[0]] if places else []


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], tokenizer: Tokenizer) -> str:
    """Byte-level BPE. Text is split by a tiktoken tokenizer's pattern; for bytes it is not
    split.
    """
    is_split = tokenizer.kind == "tiktoken"
    made = hf.Tokenizer(hf.models.BPE(vocab | tokenizer.named, merges, ignore_merges=is_split))
    of_gpt2 = tokenizer.options.pattern == "gpt2"
    level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_split and of_gpt2)
    if is_split and not of_gpt2:
        pattern = hf.Regex(PATTERNS[tokenizer.options.pattern])
        split = hf.pre_tokenizers.Split(pattern, behavior="isolated")
        made.pre_tokenizer = hf.pre_tokenizers.Sequence([split, level])
    else:
        made.pre_tokenizer = level
    made.decoder = hf.decoders.ByteLevel()
    made.add_special_tokens(
        [hf.AddedToken(name, special=True, normalized=False) for name in tokenizer.named]
    )
    return made.to_str()


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for token, rank in ranks.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(rank, ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    return [(a, b) for *_, a, b in sorted(found)]
