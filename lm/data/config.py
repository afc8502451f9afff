"""The data configuration: tokenizer, sources and batches, and checks of more than one field."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from lm.data.growth import NO_WARMUP, BatchWarmup
from lm.mapping import NOT_NEGATIVE, OWN, SHARE, Bound, Count, Later, Tokens, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer, which turns text into tokens.

    Attributes:
      kind: `bytes`; `bpe`, trained on the sources; `json`, a tokenizer.json; or `tiktoken`, a file
        of ranks
      path: the file that `json` and `tiktoken` read; empty for the others
      vocab_size: number of tokens, including the end of text; the model has as many
      pattern: how `tiktoken` splits text; Llama 3 uses `cl100k_base`
      end_of_text: the name of the token that ends every document; empty: the tokenizer's usual one
      bos: the name of the token that begins every document; empty: none
    """

    kind: Literal["bytes", "bpe", "json", "tiktoken"]
    path: str
    vocab_size: Annotated[int, Bound("must be >= 257 (bytes and end of text)", lambda n: n >= 257)]
    pattern: Annotated[Literal["gpt2", "cl100k_base", "o200k_base"], Later("gpt2")]
    end_of_text: Annotated[str, Later("")]
    bos: Annotated[str, Later("")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of text, and its share of the training.

    Attributes:
      path: `stdlib`, or a file or glob of files of any kind that lm/readers has a reader for
      text_key: key of the text in JSON lines and Parquet
      weight: share of the training tokens, relative to the other sources; 0: not trained on
      valid_fraction: share of the text held out as the validation set of this source's name (0:
        none, 1: all): whole documents, chosen by the hash of their path or id, or the ends of
        documents where there are few (lm/data/splits.py)
      token_dtype: type of the ids in .bin files, which do not state it
      max_tokens: reading stops after this many tokens; 0: read everything
    """

    path: Annotated[str, OWN]
    text_key: str
    weight: Annotated[float, NOT_NEGATIVE]
    valid_fraction: Annotated[float, SHARE]
    token_dtype: Annotated[Literal["", "uint16", "uint32"], Later("")]
    max_tokens: Annotated[int, NOT_NEGATIVE, Later(0)]


def held_out(path: str, text_key: str) -> SourceConfig:
    """A source that is only evaluated on."""
    return SourceConfig(
        path=path, text_key=text_key, weight=0.0, valid_fraction=1.0, token_dtype="", max_tokens=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that a run reads, and its batches.

    Attributes:
      tokenizer: the tokenizer
      sources: name -> source of text
      context_length: tokens in a row
      batch_size: rows in a batch
      packing: how documents fill rows: concat cuts them where a row ends; best_fit keeps documents
        that fit a row whole
      batch_warmup: how the batch grows to its size
    """

    tokenizer: TokenizerConfig
    sources: Mapping[str, SourceConfig]
    context_length: Tokens
    batch_size: Count
    packing: Literal["concat", "best_fit"]
    batch_warmup: Annotated[BatchWarmup, Later(NO_WARMUP)]


def check(data: DataConfig) -> None:
    """Checks that involve several fields.

    Raises:
      UserError: there is nothing to train on, a source or tokenizer contradicts itself, or the
      batch cannot grow to its size.
    """
    if (message := data.batch_warmup.problem(data.batch_size)) is not None:
        raise UserError(message)
    if data.sources and not any(source.weight > 0 for source in data.sources.values()):
        raise UserError(
            "data.sources has no source with weight > 0; set "
            f"data.sources.{next(iter(data.sources))}.weight=1, or that of another"
        )
    for name, source in data.sources.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(
                f"data.sources.{name}: a name takes letters, digits, _ and -; rename it"
            )
        if source.valid_fraction == 1.0 and source.weight > 0:
            others = [x for x in data.sources if x != name and data.sources[x].weight > 0]
            raise UserError(
                f"data.sources.{name} has valid_fraction=1 and weight={source.weight}: nothing is "
                f"left to train on; set data.sources.{name}.valid_fraction=0.5 or another below 1"
                + (f", or data.sources.{name}.weight=0" if others else "")
            )
    if data.tokenizer.kind in ("json", "tiktoken") and not data.tokenizer.path:
        raise UserError(
            f"data.tokenizer.kind={data.tokenizer.kind!r} needs data.tokenizer.path; set it"
        )
    if data.tokenizer.kind != "tiktoken" and data.tokenizer.pattern != "gpt2":
        raise UserError(
            f"data.tokenizer.pattern={data.tokenizer.pattern!r} is only for tiktoken files, and "
            f"kind={data.tokenizer.kind!r} reads none; set data.tokenizer.pattern=gpt2"
        )
    if data.tokenizer.kind in ("bytes", "bpe") and data.tokenizer.path:
        raise UserError(
            f"data.tokenizer.path is set but kind={data.tokenizer.kind!r} reads no file; set path "
            "to ''"
        )
