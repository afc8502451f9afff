"""Sources of text: which files a path stands for.

- `stdlib`: the running Python's own `*.py`, without tests and installed packages (about 12 MB).
- `datasets:NAME:SPLIT`: a data set on the Hugging Face hub (lm/data/streams.py).
- An address or a glob of addresses (lm/data/addresses.py).
- A glob (`~` and `**` allowed) of files that lm/readers can read, or a folder that one of the
  readers recognizes as a data set. A part of the path without * or ? that exists as written is
  taken literally: "x[v1]/*.txt" is the folder x[v1].

A file's name is its path below the root, which is the part of the glob before any wildcard. A file
counts once, however many symbolic links lead to it. Of these paths the one without links is taken,
or else the shortest, and the others are counted as duplicates. Two hard links are two files. Files
are read in the order of their names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import heapq
import json
import logging
import os
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm import files, readers
from lm.config import SourceConfig, UserError
from lm.data import addresses, streams
from lm.data.addresses import Address
from lm.data.streams import Stream
from lm.readers import Asked, File

log = logging.getLogger(__name__)

# Reasons why something is left out.
BROKEN, SPECIAL = "broken link", "special file"
DUPLICATE, DUPLICATE_FOLDER = "duplicate file", "duplicate folder"
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What is not read, by reason: how many, and the first one."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def include(self, other: LeftOut) -> None:
        """Adds what was left out elsewhere, for other reasons."""
        self.counts.update(other.counts)
        self.first.update(other.first)

    def __str__(self) -> str:
        """For example "30 undecodable (first a.txt), 1 empty (first b.txt)"."""
        shown = [
            f"{n:,} {reason} (first {self.first[reason]})" for reason, n in self.counts.items()
        ]
        return ", ".join(shown).replace("\n", "\\n")


@functools.cache
def warn_left_out(where: str, message: str) -> None:
    """Logs what was left out, once per process: a study reads the same data for each of its
    runs.
    """
    log.warning("%s; left out: %s", where, message)


@dataclasses.dataclass(frozen=True, eq=False)  # equal only to itself: its files may change
class Corpus:
    """The files of one source, listed but not yet read, and the paths that were left out."""

    name: str
    config: SourceConfig
    files: tuple[File, ...]
    left_out: LeftOut
    end_of_text: int | None = None  # the tokenizer's, if the files hold ids

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def holds_tokens(self) -> bool:
        """Whether any file holds ids instead of text."""
        found = (readers.find(file.name) for file in self.files)
        return any(reader is not None and reader.has_tokens for reader in found)

    @property
    def is_stream(self) -> bool:
        return any(isinstance(file.path, Stream) for file in self.files)

    @property
    def asked(self) -> Asked:
        """What the readers are asked for."""
        return Asked(self.name, self.config.text_key, self.config.token_dtype, self.end_of_text)

    @property
    def description(self) -> dict[str, Any]:
        """Exactly what determines the documents and the two splits."""
        listing = json.dumps([[f.name, f.size, f.version] for f in self.files]).encode()
        return {
            "path": self.config.path,
            "text_key": self.config.text_key,
            "token_dtype": self.config.token_dtype,
            "max_tokens": self.config.max_tokens,
            "valid_fraction": self.config.valid_fraction,
            "num_files": len(self.files),
            "listing_sha256": hashlib.sha256(listing).hexdigest(),
        }


def create(name: str, config: SourceConfig) -> Corpus:
    """Lists the files of a source.

    Raises:
      UserError: nothing matches, or a matching file is of a kind that cannot be read.
    """
    where = f"data.sources.{name}.path={config.path!r}"
    left_out = LeftOut()
    with files.one_line(where):
        if config.path.startswith(streams.PREFIX):
            return Corpus(name, config, _streamed(name, config, where), left_out)
        if addresses.is_address(config.path):
            found = addresses.listed(config.path)
        else:
            found = _local(config.path, where, left_out)
    if not found:
        links = f" but {left_out}" if left_out.counts else ""
        brackets = "; [ ] are a pattern, [[] is a bracket" if "[" in config.path else ""
        raise UserError(
            f"{where} matches no file{links}; set a path or glob that does (relative to "
            f"{os.getcwd()}){brackets}"
        )
    for file in found:
        if readers.find(file.name) is None:
            raise UserError(
                f"{where} matches {str(file.path)!r}, which is none of {readers.known()}; narrow "
                "the glob"
            )
    return Corpus(name, config, tuple(found), left_out)


def _streamed(name: str, config: SourceConfig, where: str) -> tuple[File, ...]:
    if not config.max_tokens:
        raise UserError(
            f"{where} is a stream, read until it has given max_tokens; set "
            f"data.sources.{name}.max_tokens=1000000 or another number"
        )
    stream = streams.parse(config.path, where)
    return (File(stream, str(stream), 0, ""),)


def _local(path: str, where: str, left_out: LeftOut) -> list[File]:
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _listed(_stdlib_paths(root), root, left_out)
    if not os.path.isdir(folder := os.path.expanduser(path)):
        root, paths = matches(path, left_out)
        return _listed(paths, root, left_out)
    members = (reader.members(Path(folder)) for reader in readers.every())
    paths = next((found for found in members if found is not None), None)
    if paths is None:
        raise UserError(f"{where} is a folder; set a glob such as '{path.rstrip('/')}/**/*.txt'")
    return _listed(paths, Path(folder), left_out)


def _raise(error: OSError) -> None:
    raise error


def matches(path: str, left_out: LeftOut) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard of a path or glob (`~` allowed), and the sorted paths
    that match. Names relative to that folder stay the same if a tree is moved as a whole. Each
    folder is searched once, however many links lead to it.

    Raises:
      UserError: a folder cannot be read.
    """
    parts: tuple[str, ...] = Path(os.path.expanduser(path)).parts
    root = Path()
    while parts[1:] and _is_literal(root / parts[0]):
        root, parts = root / parts[0], parts[1:]
    if parts[-1:] == ("**",):
        parts = (*parts, "*")
    found: list[Path] = []
    broken: set[Path] = set()
    # Folders behind links wait, so that a file reachable without a link is found without one.
    waiting = [(root, parts)] if parts else []
    behind_links: list[tuple[int, Path, tuple[str, ...]]] = []  # a heap: the shortest first
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting or behind_links:
        is_link = not waiting
        folder, parts = heapq.heappop(behind_links)[1:] if is_link else waiting.pop()
        part, rest = parts[0], parts[1:]
        place = os.path.realpath(folder), parts
        if place in seen:
            if is_link:
                left_out.add(DUPLICATE_FOLDER, str(folder))
            continue
        seen.add(place)
        if part == "**":
            waiting.append((folder, rest))
        for entry in _entries(folder, part):
            if part != "**" and not rest:
                found.append(entry)
            elif entry.is_dir():
                after = parts if part == "**" else rest
                if entry.is_symlink():
                    heapq.heappush(behind_links, (len(entry.parts), entry, after))
                else:
                    waiting.append((entry, after))
            elif entry.is_symlink() and not entry.exists():
                broken.add(entry)
    for entry in sorted(broken.difference(found)):  # broken links that stood for a folder or file
        left_out.add(BROKEN, str(entry))
    return root, sorted(found)


def _is_literal(path: Path) -> bool:
    name = path.name
    if "[" in name and not ("*" in name or "?" in name):
        return os.path.lexists(path)
    return not glob.has_magic(name)


def _entries(folder: Path, part: str) -> list[Path]:
    """The entries of a folder that match one part of a glob; "**" matches all."""
    if _is_literal(folder / part):
        return [folder / part] if os.path.lexists(folder / part) else []
    with files.one_line(f"cannot read the folder {folder}"):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    shown = [name for name in names if part.startswith(".") or not name.startswith(".")]
    return [folder / name for name in shown if part == "**" or fnmatch.fnmatchcase(name, part)]


def check_unchanged(file: File, corpus: Corpus) -> None:
    """Refuses a file that changed since it was listed.

    Raises:
      UserError: its size or time differs, or it is gone.
    """
    if isinstance(file.path, Stream):
        return
    with files.one_line(f"cannot read {file.path} of data.sources.{corpus.name}"):
        if isinstance(file.path, Address):
            size, version = file.path.state()
        else:
            status = file.path.stat()
            size, version = status.st_size, status.st_mtime_ns
    if (size, version) != (file.size, file.version):
        raise UserError(
            f"{file.path} of data.sources.{corpus.name} changed while it was read (listed with "
            f"{file.size} bytes, now {size}); let what writes it end, and start again"
        )


def _stdlib_paths(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_EXCLUDED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return paths


def _listed(paths: Iterable[Path], root: Path, left_out: LeftOut) -> list[File]:
    """Regular files, each once: by the path without links, or else by the shortest, first path."""
    real_folder = functools.cache(os.path.realpath)
    chosen: dict[str, tuple[bool, File]] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        with files.one_line(f"cannot read {path}"):
            if path.is_symlink() and not path.exists():
                left_out.add(BROKEN, str(path))
                continue
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            if not stat.S_ISDIR(status.st_mode):
                left_out.add(SPECIAL, str(path))
            continue
        name = path.relative_to(root)
        real = (
            os.path.realpath(path)
            if path.is_symlink()
            else f"{real_folder(path.parent)}/{path.name}"
        )
        is_linked = real != os.path.join(real_folder(root), name)
        file = File(path, name.as_posix(), status.st_size, status.st_mtime_ns)
        was_linked, other = chosen.setdefault(real, (is_linked, file))
        if other is not file:
            is_better = was_linked and not is_linked
            left_out.add(DUPLICATE, str(other.path if is_better else path))
            if is_better:
                chosen[real] = is_linked, file
    return sorted((file for _, file in chosen.values()), key=lambda file: file.path)
