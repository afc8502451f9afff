"""Prepare: sources -> tokenizer -> stores below a data folder, made once and reused.

    <data_dir>/tokenizer-<hash>/tokenizer.json    if trained: hash of its size and training files
    <data_dir>/tokenizer-<hash>/sha256            of that file
    <data_dir>/<source>-<hash>/tokenizer.json     the tokenizer of these tokens
    <data_dir>/<source>-<hash>/{train,valid}/...  hash of files, split and tokenizer; see store.py

Each folder is written under a temporary name while a lock file is held, and renamed when complete.
So a second process waits and reuses the result, and a process that dies leaves nothing that is
used. What was left out of a source is logged in one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lm import files
from lm.config import DataConfig, UserError
from lm.data import documents, sources, splits, tokenizers, writing
from lm.data.addresses import is_address
from lm.data.sources import Corpus, LeftOut
from lm.data.store import SPLITS, Store, open_store
from lm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)
FORMAT = 3  # raise it when the meaning of the files changes; older folders are then not used


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a loader reads: the tokenizer, the opened stores by source and split, and by source what
    was left out.
    """

    tokenizer: Tokenizer
    stores: Mapping[str, Mapping[str, Store]]
    left_out: Mapping[str, LeftOut]

    @property
    def left_out_counts(self) -> dict[str, dict[str, int]]:
        """{source: {reason: number}}, for sources of which something was left out."""
        return {name: left.counts for name, left in self.left_out.items() if left.counts}


@dataclasses.dataclass(frozen=True)
class _Place:
    """The folder of prepared data, for a process that writes it or one that only reads it."""

    data_dir: Path
    is_writer: bool

    def once(self, name: str, write: Callable[[Path], None]) -> Path:
        """The folder of this name; `write` fills it unless it exists."""
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
    """Where prepared data is kept: the flag, or ESPALIER_DATA, or the user's cache folder.

    Raises:
      UserError: it is an address, such as s3://...
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = flag or os.environ.get("ESPALIER_DATA") or os.path.join(cache, "espalier")
    if is_address(chosen):  # as a path it would be a folder named s3: here
        raise UserError(
            f"--data_dir (or ESPALIER_DATA) is {chosen}, an address; name a folder of a mounted "
            "file system (sources may be addresses)"
        )
    return Path(os.path.expanduser(chosen)).absolute()


def prepare(
    config: DataConfig,
    data_dir: Path,
    *,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
    verify: bool = False,
    is_writer: bool = True,
) -> Prepared:
    """Prepares what is missing and opens everything. `tokenizer`, if given, is used instead of the
    config's. If not `is_writer`, another process must have prepared the data.

    Raises:
      UserError: a source, the tokenizer or a store cannot be used. Nothing is left half written.
    """
    place = _Place(data_dir, is_writer)
    corpora = {name: sources.create(name, source) for name, source in config.sources.items()}
    with _bar(progress) as bar:
        if tokenizer is None:
            tokenizer = _tokenizer(config, corpora, place, bar)
        tokenizers.check_vocab_size(tokenizer, config.tokenizer)
        end = tokenizer.end_of_text
        corpora = {
            n: dataclasses.replace(c, end_of_text=end) if c.holds_tokens else c
            for n, c in corpora.items()
        }
        folders = {n: _tokenized(c, tokenizer, place, bar) for n, c in corpora.items()}
    stores = {}
    for name, folder in folders.items():
        _check_tokenizer(folder, tokenizer.sha256)
        source = corpora[name].description
        open_split = functools.partial(open_store, tokenizer_sha256=tokenizer.sha256, source=source)
        stores[name] = {split: open_split(folder / split, verify=verify) for split in SPLITS}
    left_out = {name: _left_out(corpus, stores[name]) for name, corpus in corpora.items()}
    for name, source in config.sources.items():
        kept, message = sum(x.num_documents for x in stores[name].values()), str(left_out[name])
        if not kept:
            raise UserError(
                f"data.sources.{name} holds no text (left out: {message or 'nothing'}); set "
                "another path"
            )
        _check_splits(name, source.weight, source.valid_fraction, stores[name])
        if 0 < source.valid_fraction < 1 and is_writer and progress:
            _say(_held_out(name, stores[name]))
        if message and is_writer:
            sources.warn_left_out(f"data.sources.{name}: {kept:,} documents", message)
    return Prepared(tokenizer, stores, left_out)


def _left_out(corpus: Corpus, splits: Mapping[str, Store]) -> LeftOut:
    """Files that were not listed, and documents that were left out of the files that were read."""
    found = LeftOut()
    found.include(corpus.left_out)
    found.include(LeftOut(**splits["train"].meta["left_out"]))
    return found


def _check_tokenizer(folder: Path, sha256: str) -> None:
    path = folder / "tokenizer.json"
    with files.one_line(f"cannot read {path}", f"delete {folder} and prepare again"):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path} has sha256 {found[:12]}, expected {sha256[:12]}; delete {folder} and prepare "
            "again"
        )


def _check_splits(
    name: str, weight: float, valid_fraction: float, stores: Mapping[str, Store]
) -> None:
    train, valid = (stores[split].num_documents for split in SPLITS)
    where = f"data.sources.{name}.valid_fraction={valid_fraction}"
    if (weight > 0 and not train) or (valid_fraction > 0 and not valid):
        raise UserError(
            f"{where} divides nothing: each of its {train + valid} documents is a single letter; "
            f"set data.sources.{name}.valid_fraction=0, or another path"
        )


def _held_out(name: str, stores: Mapping[str, Store]) -> str:
    """One line that says how much of a source is held out."""
    train, valid = (stores[split].num_documents for split in SPLITS)
    sizes = [stores[split].meta["bytes"] for split in SPLITS]
    share = f"{100 * sizes[1] / sum(sizes):.3g} % of the bytes"
    if stores["valid"].meta["split_by"] == splits.TAILS:
        whose = "its document" if valid == 1 else f"each of {valid:,} documents"
        return f"data.sources.{name}: the end of {whose} is held out, {share}"
    are = "is" if valid == 1 else "are"
    return f"data.sources.{name}: {valid:,} of {train + valid:,} documents {are} held out, {share}"


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
    for corpus in weighted:
        if corpus.holds_tokens or corpus.is_stream:
            holds = "is a stream, which is read once" if corpus.is_stream else "holds ids"
            raise UserError(
                f"data.sources.{corpus.name} {holds}, and data.tokenizer.kind='bpe' is trained on "
                "files of text; set data.tokenizer.kind and data.tokenizer.path"
            )
    identity = [config.tokenizer.vocab_size, [corpus.description for corpus in weighted]]

    def write(temporary: Path) -> None:
        made = tokenizers.create(config.tokenizer, _training_texts(weighted, bar))
        made.save(temporary / "tokenizer.json")
        (temporary / "sha256").write_text(made.sha256 + "\n")

    folder = place.once(f"tokenizer-{_hash(identity)}", write)
    with files.one_line(f"cannot read {folder / 'sha256'}", f"delete {folder} and prepare again"):
        known = (folder / "sha256").read_text(encoding="utf-8").strip()
    _check_tokenizer(folder, known)
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    if place.is_writer and tokenizer.vocab_size < config.tokenizer.vocab_size:
        num_bytes = sum(corpus.num_bytes for corpus in weighted)
        _warn_of_small_text(tokenizer.vocab_size, config.tokenizer.vocab_size, num_bytes)
    return tokenizer


@functools.cache
def _warn_of_small_text(found: int, vocab_size: int, num_bytes: int) -> None:
    """Logs it once per process: a study reads the same data for each of its runs."""
    log.warning(
        "data.tokenizer.kind='bpe' finds %s tokens in %s bytes of text, which is too little for "
        "data.tokenizer.vocab_size=%d; add text, or set data.tokenizer.kind=bytes and "
        "data.tokenizer.vocab_size=257",
        *(f"{found:,}", f"{num_bytes:,}", vocab_size),
    )


def _training_texts(corpora: list[Corpus], bar: Progress) -> Iterator[str]:
    task = bar.add_task("train tokenizer", total=sum(corpus.num_bytes for corpus in corpora))
    for corpus in corpora:
        for found in documents.documents(corpus, LeftOut(), lambda n: bar.advance(task, n)):
            if not found.is_valid:
                yield from (
                    piece for piece in documents.pieces(found.utf8) if isinstance(piece, str)
                )


def _tokenized(corpus: Corpus, tokenizer: Tokenizer, place: _Place, bar: Progress) -> Path:
    name = re.sub(r"[^\w.-]", "_", corpus.name)[:64]

    def write(temporary: Path) -> None:
        tokenizer.save(temporary / "tokenizer.json")
        task = bar.add_task(f"tokenize {corpus.name}", total=corpus.num_bytes)
        writing.write_splits(corpus, tokenizer, temporary, lambda n: bar.advance(task, n))

    return place.once(f"{name}-{_hash([corpus.description, tokenizer.sha256])}", write)


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill `folder` unless it exists. One process at a time, all or nothing."""
    try:
        if folder.is_dir():
            return
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
                files.sync_all(temporary)
                os.replace(temporary, folder)
                files.sync(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; {files.advice(error)}, or set --data_dir "
            "(or ESPALIER_DATA) to another folder"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as stream:
        if not files.lock(stream):
            print(
                f"another process is preparing {path.name[1:-5]}; waiting for it", file=sys.stderr
            )
            files.lock(stream, is_waiting=True)
        yield


@functools.cache
def _say(line: str) -> None:
    """Prints a line once per process: a study reads the same data for each of its runs."""
    print(line, file=sys.stderr, flush=True)


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (progress and console.is_terminal))


def _hash(identity: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, identity]).encode()).hexdigest()[:12]
