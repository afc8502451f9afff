"""Tokens: ids already made by a tokenizer, in files as other projects write them.

    .npy   a one-dimensional array; its header states the type
    .bin   only ids, of the type `token_dtype` (nanoGPT's train.bin: uint16); or uint16 after the
           header of 1,024 bytes that llm.c writes (20240520, 1, number of ids as int32)

A document ends with the end of text of the tokenizer in data.tokenizer, which must be the one that
made the ids. Additional ends of text, before the first document or between documents, are skipped;
llm.c puts one at the start. A local file is memory-mapped and not read whole.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lm.mapping import UserError
from lm.readers import Asked, Opened, Reader, Row

_MAGIC, _HEADER = (20240520, 1), 256  # llm.c's header: its first two values, and its int32 values
_CHUNK = 1 << 24  # ids searched at once for the end of text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Reader):
    """A document's key is the name of the file and the document's number in it."""

    endings = (".bin", ".npy")
    has_ids = False
    has_tokens = True

    def rows(self, opened: Opened, asked: Asked) -> Iterator[Row]:
        file = opened.file
        ids = _npy(opened, asked) if file.name.endswith(".npy") else _bin(opened, asked)
        assert asked.end_of_text is not None, "lm/data/prepare.py asks with the tokenizer's"
        for number, (start, end) in enumerate(_documents(ids, asked.end_of_text), start=1):
            place = f"{file.path}: document {number}"
            yield Row(f"{file.name}:{number}", ids[start:end], file.size * end // len(ids), place)


def _documents(ids: np.ndarray, end_of_text: int) -> Iterator[tuple[int, int]]:
    start = 0
    for first in range(0, len(ids), _CHUNK):
        for place in np.flatnonzero(ids[first : first + _CHUNK] == end_of_text).tolist():
            if first + place > start:
                yield start, first + place
            start = first + place + 1
    if start < len(ids):
        yield start, len(ids)


def _npy(opened: Opened, asked: Asked) -> np.ndarray:
    path, name = opened.file.path, asked.source
    if isinstance(path, Path):
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        ids = np.load(io.BytesIO(opened.stream.read()), allow_pickle=False)
    if ids.ndim != 1 or ids.dtype.name not in ("uint16", "uint32"):
        raise UserError(
            f"{path} of data.sources.{name} holds {ids.dtype.name} of {ids.ndim} dimensions; save "
            "one dimension of uint16 or uint32"
        )
    if asked.token_dtype not in ("", ids.dtype.name):
        raise UserError(
            f"{path} holds {ids.dtype.name} and data.sources.{name}.token_dtype="
            f"{asked.token_dtype!r}; set data.sources.{name}.token_dtype={ids.dtype.name}"
        )
    return ids


def _bin(opened: Opened, asked: Asked) -> np.ndarray:
    path, where = opened.file.path, f"data.sources.{asked.source}.token_dtype"
    head = np.frombuffer(opened.stream.read(4 * _HEADER), "u1")
    numbers = np.frombuffer(head[: len(head) // 4 * 4].tobytes(), "<i4")[:3].tolist()
    start, dtype, count = 0, asked.token_dtype, None
    if len(numbers) == 3 and tuple(numbers[:2]) == _MAGIC:
        start, dtype, count = 4 * _HEADER, "uint16", numbers[2]
        if asked.token_dtype not in ("", dtype):
            raise UserError(f"{path} has llm.c's header, of uint16; set {where}=uint16")
    if not dtype:
        raise UserError(f"{path} does not say how wide its ids are; set {where}=uint16 or uint32")
    kind = np.dtype(dtype).newbyteorder("<")
    size = opened.file.size - start
    if size % kind.itemsize or count not in (None, size // kind.itemsize):
        message = f"{size:,} bytes of {dtype}" + (
            f" for {count:,} ids" if count is not None else ""
        )
        raise UserError(f"{path} has {message}: it is cut short, or of another type; set {where}")
    if not size:
        return np.zeros(0, kind)
    if isinstance(path, Path):
        return np.memmap(path, kind, mode="r", offset=start)
    opened.stream.seek(start)
    return np.frombuffer(opened.stream.read(), kind)
