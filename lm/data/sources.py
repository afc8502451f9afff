"""Sources of text: which files, which documents in them, and which of those are held out.

- `stdlib`: the running Python's own `*.py`, without tests and installed packages (about 12 MB of
  code).
- a glob (`~` and `**` allowed) of .txt .md .py .txt.gz (one document each), .jsonl .jsonl.gz (one
  per line, the text under `text_key`) and .parquet (one per row, column `text_key`).

A document's key is its path below the root (the glob's part without wildcards), with a line or row
number where a file holds many, or its `id` field where it has one. It is held out for validation
iff sha256(key), read as a fraction in [0, 1), is below `valid_fraction`: stable when other
documents come and go. Files are visited in sorted order. What is not UTF-8 or is empty is skipped
and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import gzip
import hashlib
import importlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm.config import SourceConfig, UserError, nearest

PLAIN = (".txt", ".md", ".py", ".txt.gz")
LINES = (".jsonl", ".jsonl.gz")
PARQUET = (".parquet",)
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    key: str
    text: str


class File(NamedTuple):
    path: Path
    name: str  # relative to the root, with forward slashes
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of one source, listed but not read."""

    name: str
    config: SourceConfig
    files: tuple[File, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def description(self) -> dict[str, Any]:
        """What decides the content of the documents and of the two splits, and nothing else."""
        listing = json.dumps([[f.name, f.size, f.mtime_ns] for f in self.files]).encode()
        return {
            "path": self.config.path,
            "text_key": self.config.text_key,
            "valid_fraction": self.config.valid_fraction,
            "num_files": len(self.files),
            "listing_sha256": hashlib.sha256(listing).hexdigest(),
        }


def create(name: str, config: SourceConfig) -> Corpus:
    """Lists the files of a source.

    Raises:
      UserError: nothing matches, or a match is not a kind of file that can be read.
    """
    where = f"data.sources.{name}.path={config.path!r}"
    if config.path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = _stdlib_paths(root)
    else:
        pattern = os.path.expanduser(config.path)
        if os.path.isdir(pattern):
            raise UserError(
                f"{where} is a folder; set a glob such as '{config.path.rstrip('/')}/**/*.txt'"
            )
        root = _root(pattern)
        paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not paths:
        raise UserError(
            f"{where} matches no file; set a path or glob that does (relative to {os.getcwd()})"
        )
    for path in paths:
        if not path.name.endswith(PLAIN + LINES + PARQUET):
            known = " ".join(PLAIN + LINES + PARQUET)
            raise UserError(f"{where} matches {path}, which is none of {known}; narrow the glob")
    return Corpus(name, config, tuple(_stat(path, root) for path in paths))


def is_valid(key: str, valid_fraction: float) -> bool:
    """Whether the document with this key is held out.

    >>> [is_valid(f"{i}.py", 0.5) for i in range(6)]
    [True, True, False, False, True, False]
    """
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 2.0**64 < valid_fraction


def documents(
    corpus: Corpus,
    skipped: collections.Counter[str],
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[Document]:
    """Documents in order. `skipped` counts what is left out; `advance` is told bytes read."""
    for file in corpus.files:
        try:
            position = 0
            for key, data, next_position in _records(file, corpus):
                advance(next_position - position)
                position = next_position
                text = _text(data)
                if text:
                    yield Document(key, text)
                else:
                    skipped["undecodable" if text is None else "empty"] += 1
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"cannot read {file.path} of data.sources.{corpus.name}: {error}"
            ) from error
        advance(file.size - position)


def _stdlib_paths(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_EXCLUDED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def _root(pattern: str) -> Path:
    """The folder above the first wildcard: keys stay the same when a tree is moved as a whole."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def _stat(path: Path, root: Path) -> File:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return File(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


def _records(file: File, corpus: Corpus) -> Iterator[tuple[str, bytes | str, int]]:
    """Key, text and the place in the file where the reader stands."""
    if file.name.endswith(PARQUET):
        yield from _parquet_rows(file, corpus)
        return
    with open(file.path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
        if file.name.endswith(PLAIN):
            yield file.name, stream.read(), file.size
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                key, place = f"{file.name}:{number}", f"{file.path}:{number}"
                yield *_json_record(line, key, place, corpus), raw.tell()


def _json_record(line: bytes, key: str, place: str, corpus: Corpus) -> tuple[str, str]:
    text_key, name = corpus.config.text_key, corpus.name
    try:
        record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise UserError(
            f"{place} of data.sources.{name} is not JSON ({error}); mend or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{place} of data.sources.{name} is a {type(record).__name__}; a line must be an object"
        )
    if text_key not in record:
        raise UserError(
            f"{place} has no key {text_key!r} (data.sources.{name}.text_key); "
            f"{nearest(text_key, record)}"
        )
    if not isinstance(record[text_key], str):
        kind = type(record[text_key]).__name__
        raise UserError(
            f"{place}: {text_key!r} (data.sources.{name}.text_key) is a {kind}; it must be a string"
        )
    return _identity(record.get("id"), key), record[text_key]


def _parquet_rows(file: File, corpus: Corpus) -> Iterator[tuple[str, str, int]]:
    text_key, name = corpus.config.text_key, corpus.name
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"{file.path} is Parquet and pyarrow is missing; pip install 'espalier[data]'"
        ) from error
    try:
        with parquet.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            if text_key not in schema.names:
                hint = nearest(text_key, schema.names)
                raise UserError(
                    f"{file.path} has no column data.sources.{name}.text_key={text_key!r}; {hint}"
                )
            if not _is_string(schema.field(text_key).type, arrow):
                kind = schema.field(text_key).type
                raise UserError(
                    f"{file.path}: column text_key={text_key!r} holds {kind}; it must hold strings"
                )
            columns = [text_key] + (["id"] if "id" in schema.names and text_key != "id" else [])
            number, num_rows = 0, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    key = _identity(row.get("id"), f"{file.name}:{number}")
                    yield key, row[text_key] or "", file.size * number // num_rows
    except arrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"{file.path} of data.sources.{name} is not readable Parquet: {message}"
        ) from error


def _is_string(kind: Any, arrow: Any) -> bool:
    return arrow.types.is_string(kind) or arrow.types.is_large_string(kind)


def _identity(value: Any, key: str) -> str:
    return (
        str(value)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        else key
    )


def _text(data: bytes | str) -> str | None:
    """Decoded text, or None where it is not UTF-8 (JSON can also spell half a surrogate pair)."""
    try:
        if isinstance(data, bytes):
            return data.decode("utf-8")
        data.encode("utf-8")
    except UnicodeError:
        return None
    return data
