"""Store: one split of one source as token ids on disk.

    tokens.bin   the documents; each ends with the end of text, and begins with the bos if the
                 tokenizer has one; uint16 up to 65,535 ids, else uint32
    docs.idx     int64 offsets into tokens.bin, one more than there are documents
    chunks.sum   a digest of 16 bytes for every 64 KiB of tokens.bin
    meta.json    counts, dtype, split, source, bytes of every id; sha256 of the tokenizer, of the
                 other files, and of the rest of itself

Opening a store checks everything except the tokens. Each chunk of tokens is checked when it is
first read in a process; `verify` checks all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from lm import files
from lm.config import UserError
from lm.data.sources import LeftOut
from lm.data.tokenizers import Tokenizer

SPLITS = ("train", "valid")
CHUNK = 1 << 16  # bytes; small, because reading one row may need to read and check a whole chunk
_DIGEST = 16  # bytes
_META_KEYS = {
    "documents", "tokens", "bytes", "dtype", "end_of_text", "left_out", "split", "split_by",
    "source", "tokens_sha256", "docs_sha256", "chunks_sha256", "tokenizer_sha256",
    "token_bytes",
}  # fmt: skip


class Tokens:
    """The ids of a split, `tokens[a:b]` or `tokens[places]`, read from the file on demand.

    Raises:
      UserError: a chunk that is read differs from what was written.
    """

    def __init__(self, path: Path, ids: np.ndarray, digests: bytes):
        self._path, self._ids, self._digests = path, np.asarray(ids), digests
        self._per_chunk = CHUNK // ids.itemsize
        self._is_checked = np.zeros(-(-len(ids) // self._per_chunk), bool)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            start, stop, _ = where.indices(len(self))
            chunks = np.arange(start // self._per_chunk, -(-stop // self._per_chunk))
        else:
            chunks = where // self._per_chunk
        if not self._is_checked[chunks].all():
            for chunk in np.unique(chunks[~self._is_checked[chunks]]).tolist():
                self._check(chunk)
        return self._ids[where]

    def _check(self, chunk: int) -> None:
        data = self._ids[chunk * self._per_chunk : (chunk + 1) * self._per_chunk].tobytes()
        found, known = _digest(data), self._digests[chunk * _DIGEST : (chunk + 1) * _DIGEST]
        if found != known:
            raise _damaged(
                self._path,
                f"digest of bytes {chunk * CHUNK} on",
                found.hex()[:12],
                known.hex()[:12],
            )
        self._is_checked[chunk] = True


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An opened split. Document i is `tokens[offsets[i] : offsets[i + 1]]`, with its end of
    text.
    """

    folder: Path
    tokens: Tokens
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
    """Appends encoded documents to a new split; `finish` writes the other files."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65535 else "<u4")
        self._hash = hashlib.sha256()
        self._offsets = array("q", [0])
        self.num_tokens = 0  # so far
        self._is_inside = False  # whether a document has begun and not ended
        self._bytes = 0
        self._chunk, self._digests = bytearray(), bytearray()
        folder.mkdir(parents=True)
        self._stream: IO[bytes] = (folder / "tokens.bin").open("wb")

    def append(self, ids: np.ndarray, num_bytes: int, *, is_last: bool = True) -> None:
        """Adds a piece of a document, of `num_bytes` UTF-8 bytes; `is_last` ends the document.
        `ids` come without the end of text, and with or without the tokenizer's start.
        """
        start = self._tokenizer.start
        if start and not self._is_inside and ids[:1].tolist() != start:
            ids = np.concatenate([start, ids])
        self._is_inside = not is_last
        if is_last:
            ids = np.append(ids, self._tokenizer.end_of_text)
            self._offsets.append(self.num_tokens + len(ids))
        self.num_tokens += len(ids)
        self._bytes += num_bytes
        data = ids.astype(self._dtype).tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self._chunk += data
        whole = len(self._chunk) // CHUNK * CHUNK
        for start in range(0, whole, CHUNK):
            self._digests += _digest(self._chunk[start : start + CHUNK])
        del self._chunk[:whole]

    def finish(self, source: Mapping[str, Any], left_out: LeftOut, split_by: str) -> None:
        """Completes the split. `split_by` names the rule of lm/data/splits.py."""
        self._stream.close()
        digests = bytes(self._digests + (_digest(self._chunk) if self._chunk else b""))
        offsets = np.array(self._offsets, "<i8").tobytes()
        (self._folder / "docs.idx").write_bytes(offsets)
        (self._folder / "chunks.sum").write_bytes(digests)
        meta = {
            "documents": len(self._offsets) - 1,
            "tokens": self.num_tokens,
            "bytes": self._bytes,
            "dtype": self._dtype.name,
            "end_of_text": self._tokenizer.end_of_text,
            "left_out": dataclasses.asdict(left_out),
            "split": self._folder.name,
            "split_by": split_by,
            "source": dict(source),
            "tokens_sha256": self._hash.hexdigest(),
            "docs_sha256": hashlib.sha256(offsets).hexdigest(),
            "chunks_sha256": hashlib.sha256(digests).hexdigest(),
            "tokenizer_sha256": self._tokenizer.sha256,
            "token_bytes": self._tokenizer.token_bytes.tolist(),
        }
        (self._folder / "meta.json").write_text(
            json.dumps({"sha256": _sha256(meta), **meta}) + "\n"
        )

    def close(self) -> None:
        self._stream.close()


def open_store(
    folder: Path, tokenizer_sha256: str, source: Mapping[str, Any], *, verify: bool = False
) -> Store:
    """Opens a split; the folder is named after it. `source` describes what the tokens were made of.

    Raises:
      UserError: a file is missing or damaged, or the tokens are of another split, source or
      tokenizer.
    """
    meta, path = _meta(folder), folder / "meta.json"
    for what, known in {"split": folder.name, "source": dict(source)}.items():
        if meta[what] != known:
            raise _damaged(path, what, meta[what], known)
    if meta["tokenizer_sha256"] != tokenizer_sha256:
        shown = meta["tokenizer_sha256"][:12], tokenizer_sha256[:12]
        raise _damaged(path, "tokenizer sha256", *shown)
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    ids = _map(folder / "tokens.bin", dtype, meta["tokens"])
    offsets = np.array(_map(folder / "docs.idx", np.dtype("<i8"), meta["documents"] + 1))
    count = -(-ids.nbytes // CHUNK) * _DIGEST
    digests = _map(folder / "chunks.sum", np.dtype("u1"), count).tobytes()
    for name, data in {"docs.idx": offsets.tobytes(), "chunks.sum": digests}.items():
        found, known = hashlib.sha256(data).hexdigest(), meta[f"{name.split('.')[0]}_sha256"]
        if found != known:
            raise _damaged(folder / name, "sha256", found[:12], known[:12])
    tokens = Tokens(folder / "tokens.bin", ids, digests)
    if verify:
        for start in range(0, len(tokens), 1 << 20):
            _ = tokens[start : start + (1 << 20)]
    return Store(folder, tokens, offsets, meta)


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _sha256(meta: Mapping[str, Any]) -> str:
    """The digest in meta.json, which covers all its other entries."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    again = f"delete {folder.parent} and prepare again"
    if not path.exists():
        raise UserError(f"{path} is missing; {again}")
    with files.one_line(f"{path} is not readable", again):
        meta = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(_META_KEYS - dict(meta).keys())
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; {again}")
    if meta.get("sha256") != _sha256(meta):
        raise _damaged(path, "sha256", _sha256(meta)[:12], str(meta.get("sha256"))[:12])
    return meta


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path} is missing; delete {path.parents[1]} and prepare again")
    with files.one_line(f"cannot read {path}"):
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise _damaged(path, "size in bytes", size, count * dtype.itemsize)
        return np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)


def _damaged(path: Path, what: str, found: Any, expected: Any) -> UserError:
    return UserError(
        f"{path}: {what} is {found}, expected {expected}; "
        f"delete {path.parents[1]} and prepare again"
    )
