"""Reads a source of files, for the tests of readers."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import SourceConfig
from lm.data import documents, sources
from lm.data.sources import LeftOut

END = 0  # the end-of-text id in token files


def read(path: object, **changes: Any) -> tuple[list[tuple[str, Any]], dict[str, int]]:
    """(key, text or ids) of every document, and how many were left out for each reason."""
    values = {"path": str(path), "text_key": "text", "weight": 0.0, "valid_fraction": 1.0}
    source = SourceConfig(**(values | {"token_dtype": "", "max_tokens": 0} | changes))
    corpus = dataclasses.replace(sources.create("s", source), end_of_text=END)
    left_out, found, read_bytes = LeftOut(), [], list[int]()
    for document in documents.documents(corpus, left_out, read_bytes.append):
        data = document.data
        found.append(
            (document.key, data.tolist() if isinstance(data, np.ndarray) else document.text)
        )
    assert sum(read_bytes) == corpus.num_bytes
    assert min(read_bytes, default=0) >= 0
    return found, left_out.counts


def write(path: Path, content: bytes) -> Path:
    """Writes the content, packed as the file name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    if path.suffix == ".zst":
        content = zstd(content)
    path.write_bytes(content)
    return path


def zstd(content: bytes) -> bytes:
    pyarrow: Any = importlib.import_module("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()
