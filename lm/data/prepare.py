"""Prepare: sources -> tokenizer -> stores below a data folder, made once and found again.

    <data_dir>/tokenizer-<hash>/tokenizer.json    if trained: hash of its size and training files
    <data_dir>/<source>-<hash>/tokenizer.json     the tokenizer of these tokens
    <data_dir>/<source>-<hash>/{train,valid}/...  hash of files, split and tokenizer; see store.py

Each folder is written under a temporary name and renamed when complete, holding a lock file, so
that of two processes the second waits and reuses, and one that dies leaves nothing that counts.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from lm.config import DataConfig, UserError
from lm.data import sources, tokenizers
from lm.data.sources import Corpus, Document
from lm.data.store import Store, Writer, open_store
from lm.data.tokenizers import Tokenizer

FORMAT = 1  # raise when the meaning of the files changes: old folders are then not found any more
SPLITS = ("train", "valid")
_BATCH_BYTES = 1 << 22  # text given to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything a loader reads: the tokenizer and, by source and split, the opened stores."""

    tokenizer: Tokenizer
    stores: Mapping[str, Mapping[str, Store]]


@dataclasses.dataclass(frozen=True)
class _Place:
    """The folder of prepared data, as this process sees it."""

    data_dir: Path
    is_writer: bool

    def once(self, name: str, write: Callable[[Path], None]) -> Path:
        """The folder of this name, filled by `write` unless it exists."""
        folder = self.data_dir / name
        if self.is_writer:
            _once(folder, write)
        elif not folder.is_dir():
            raise UserError(
                f"{folder}, prepared by process 0, is not on {socket.gethostname()}; "
                "set --data_dir (or ESPALIER_DATA) to a folder that all processes share"
            )
        return folder


def resolve_data_dir(flag: str = "") -> Path:
    """Where prepared data live: the flag, else ESPALIER_DATA, else the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = flag or os.environ.get("ESPALIER_DATA") or os.path.join(cache, "espalier")
    return Path(chosen).expanduser().absolute()


def prepare(
    config: DataConfig,
    data_dir: Path,
    *,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
    verify: bool = False,
    is_writer: bool = True,
) -> Prepared:
    """Prepares what is missing, opens everything; `tokenizer` (a run's own) replaces the config's.
    Where not `is_writer`, another process has prepared it.

    Raises:
      UserError: a source, the tokenizer or a store cannot be used; nothing half-written is left.
    """
    place = _Place(data_dir, is_writer)
    corpora = {name: sources.create(name, source) for name, source in config.sources.items()}
    with _bar(progress) as bar:
        if tokenizer is None:
            tokenizer = _tokenizer(config, corpora, place, bar)
        tokenizers.check_vocab_size(tokenizer, config.tokenizer)
        folders = {n: _tokenized(c, tokenizer, place, bar) for n, c in corpora.items()}
    stores = {
        name: {
            split: open_store(folder / split, tokenizer.sha256, verify=verify) for split in SPLITS
        }
        for name, folder in folders.items()
    }
    for name, source in config.sources.items():
        _check_splits(name, source.weight, source.valid_fraction, stores[name])
    return Prepared(tokenizer, stores)


def _check_splits(
    name: str, weight: float, valid_fraction: float, splits: Mapping[str, Store]
) -> None:
    train, valid = (splits[split].num_documents for split in SPLITS)
    if not train + valid:
        skipped = splits["train"].meta["skipped"]
        raise UserError(
            f"data.sources.{name} holds no text (skipped: {skipped or 'nothing'}); set another path"
        )
    where = f"data.sources.{name}.valid_fraction={valid_fraction}"
    if weight > 0 and not train:
        raise UserError(
            f"{where} leaves none of {valid} documents to train on; lower it or set weight to 0"
        )
    if valid_fraction > 0 and not valid:
        raise UserError(
            f"{where} selects none of {train} documents; raise it, or set 0 and name another source"
        )


def _tokenizer(
    config: DataConfig, corpora: Mapping[str, Corpus], place: _Place, bar: Progress
) -> Tokenizer:
    if config.tokenizer.kind != "bpe":
        return tokenizers.create(config.tokenizer)
    weighted = [corpus for corpus in corpora.values() if corpus.config.weight > 0]
    if not weighted:
        raise UserError(
            "data.tokenizer.kind='bpe' is trained on data.sources, which is empty; name a source "
            "or set another kind"
        )
    identity = [config.tokenizer.vocab_size, [corpus.description for corpus in weighted]]

    def write(temporary: Path) -> None:
        tokenizers.create(config.tokenizer, _training_texts(weighted, bar)).save(
            temporary / "tokenizer.json"
        )

    folder = place.once(f"tokenizer-{_hash(identity)}", write)
    return tokenizers.load(folder / "tokenizer.json")


def _training_texts(corpora: list[Corpus], bar: Progress) -> Iterator[str]:
    skipped: collections.Counter[str] = collections.Counter()
    task = bar.add_task("train tokenizer", total=sum(corpus.num_bytes for corpus in corpora))
    for corpus in corpora:
        for key, text in sources.documents(corpus, skipped, lambda n: bar.advance(task, n)):
            if not sources.is_valid(key, corpus.config.valid_fraction):
                yield text


def _tokenized(corpus: Corpus, tokenizer: Tokenizer, place: _Place, bar: Progress) -> Path:
    name = re.sub(r"[^\w.-]", "_", corpus.name)

    def write(temporary: Path) -> None:
        tokenizer.save(temporary / "tokenizer.json")
        task = bar.add_task(f"tokenize {corpus.name}", total=corpus.num_bytes)
        _write_splits(corpus, tokenizer, temporary, lambda n: bar.advance(task, n))

    return place.once(f"{name}-{_hash([corpus.description, tokenizer.sha256])}", write)


def _write_splits(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, advance: Callable[[int], object]
) -> None:
    skipped: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(contextlib.closing(Writer(folder / split, tokenizer)))
            for split in SPLITS
        }
        for batch in _batches(sources.documents(corpus, skipped, advance)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (key, text), ids in zip(batch, encoded, strict=True):
                num_bytes = len(text.encode())
                _check_lossless(key, ids, num_bytes, tokenizer)
                split = SPLITS[sources.is_valid(key, corpus.config.valid_fraction)]
                writers[split].append(ids, num_bytes)
        for writer in writers.values():
            writer.finish(corpus.description, skipped)


def _check_lossless(key: str, ids: np.ndarray, num_bytes: int, tokenizer: Tokenizer) -> None:
    found = int(tokenizer.token_bytes[ids].sum())
    if found != num_bytes or np.any(ids == tokenizer.end_of_text):
        raise UserError(
            f"document {key!r} has {num_bytes} bytes and its tokens {found}: a lossy tokenizer; "
            "use a byte-level one without normalizer or prefix space"
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills `folder` by `write` unless it exists; one process at a time, all or nothing."""
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            for leftover in folder.parent.glob(
                f".{folder.name}.tmp-*"
            ):  # of a killed process: we hold its lock
                shutil.rmtree(leftover)
            temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
            temporary.mkdir()
            try:
                write(temporary)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; "
            "free some space or set --data_dir (or ESPALIER_DATA) to another folder"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"another process is preparing {path.name[1:-5]}; waiting for it", file=sys.stderr
            )
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (progress and console.is_terminal))


def _hash(identity: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, identity]).encode()).hexdigest()[:12]
