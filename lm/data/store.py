"""Store: one split of one source as token ids on disk.

    tokens.bin   documents, each followed by its end of text; uint16 up to 65,535 ids, else uint32
    docs.idx     int64 offsets into tokens.bin, one more than there are documents
    meta.json    counts, sha256 of both files and of the tokenizer, dtype, source, bytes of every id

Opening checks sizes, offsets and the tokenizer; `verify` also reads everything and compares the
hashes.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from lm.config import UserError
from lm.data.tokenizers import Tokenizer

_META_KEYS = {
    "documents", "tokens", "bytes", "dtype", "end_of_text", "skipped", "source",
    "tokens_sha256", "docs_sha256", "tokenizer_sha256", "token_bytes",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An opened split. Document i is `tokens[offsets[i] : offsets[i + 1]]`, end of text last."""

    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    meta: Mapping[str, Any]

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(input, target) pairs per document: one less than its tokens."""
        return np.diff(self.offsets) - 1


class Writer:
    """Appends encoded documents to a new split; `finish` writes what completes it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65535 else "<u4")
        self._hash = hashlib.sha256()
        self._lengths: list[int] = []
        self._bytes = 0
        folder.mkdir(parents=True)
        self._stream: IO[bytes] = (folder / "tokens.bin").open("wb")

    def append(self, ids: np.ndarray, num_bytes: int) -> None:
        """Adds a document of `num_bytes` UTF-8 bytes; `ids` come without end of text."""
        data = np.append(ids, self._tokenizer.end_of_text).astype(self._dtype).tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self._lengths.append(len(ids) + 1)
        self._bytes += num_bytes

    def finish(self, source: Mapping[str, Any], skipped: collections.Counter[str]) -> None:
        self._stream.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype("<i8").tobytes()
        (self._folder / "docs.idx").write_bytes(offsets)
        meta = {
            "documents": len(self._lengths),
            "tokens": sum(self._lengths),
            "bytes": self._bytes,
            "dtype": self._dtype.name,
            "end_of_text": self._tokenizer.end_of_text,
            "skipped": dict(skipped),
            "source": dict(source),
            "tokens_sha256": self._hash.hexdigest(),
            "docs_sha256": hashlib.sha256(offsets).hexdigest(),
            "tokenizer_sha256": self._tokenizer.sha256,
            "token_bytes": self._tokenizer.token_bytes.tolist(),
        }
        (self._folder / "meta.json").write_text(json.dumps(meta) + "\n")

    def close(self) -> None:
        self._stream.close()


def open_store(folder: Path, tokenizer_sha256: str, *, verify: bool = False) -> Store:
    """Opens a split.

    Raises:
      UserError: a file is missing or damaged, or the tokens were made by another tokenizer.
    """
    meta = _meta(folder)
    if meta["tokenizer_sha256"] != tokenizer_sha256:
        raise _damaged(
            folder / "meta.json",
            "tokenizer sha256",
            meta["tokenizer_sha256"][:12],
            tokenizer_sha256[:12],
        )
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    tokens = _map(folder / "tokens.bin", dtype, meta["tokens"])
    offsets = np.array(_map(folder / "docs.idx", np.dtype("<i8"), meta["documents"] + 1))
    if offsets[0] != 0 or offsets[-1] != meta["tokens"]:
        found = f"{offsets[0]}..{offsets[-1]}"
        raise _damaged(folder / "docs.idx", "range", found, f"0..{meta['tokens']}")
    if np.any(np.diff(offsets) < 2):
        raise _damaged(
            folder / "docs.idx", "shortest document", np.diff(offsets).min(), "at least 2 tokens"
        )
    if verify:
        for name in ("tokens", "docs"):
            path = folder / {"tokens": "tokens.bin", "docs": "docs.idx"}[name]
            with open(path, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != meta[f"{name}_sha256"]:
                raise _damaged(path, "sha256", found[:12], meta[f"{name}_sha256"][:12])
    return Store(folder, tokens, offsets, meta)


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; delete {folder.parent} and prepare again") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not readable ({error}); delete {folder.parent} and prepare again"
        ) from error
    if not isinstance(meta, dict) or _META_KEYS - meta.keys():
        missing = sorted(_META_KEYS - meta.keys()) if isinstance(meta, dict) else sorted(_META_KEYS)
        raise UserError(
            f"{path} lacks {', '.join(missing)}; delete {folder.parent} and prepare again"
        )
    if meta["dtype"] not in ("uint16", "uint32"):
        raise _damaged(path, "dtype", meta["dtype"], "uint16 or uint32")
    return meta


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise _damaged(path, "size in bytes", size, count * dtype.itemsize)
        return np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; delete {path.parents[1]} and prepare again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _damaged(path: Path, what: str, found: Any, expected: Any) -> UserError:
    return UserError(
        f"{path}: {what} is {found}, expected {expected}; "
        f"delete {path.parents[1]} and prepare again"
    )
