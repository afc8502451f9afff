"""Writes folders whole or not at all, and reads and writes safetensors one tensor at a time.

A folder of weights holds `model.safetensors`, or `model.safetensors.index.json` with a weight_map
from the names of tensors to shards beside it. Pickled weights (.bin, .pt, .pth) are refused:
reading them runs code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from lm import files
from lm.config import UserError
from lm.run.progress import WeightsBar

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "get the whole folder again"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Header(NamedTuple):
    """What is known about a tensor before it is read; `file` is the path of its shard."""

    file: Path
    dtype: Any
    shape: tuple[int, ...]


@contextlib.contextmanager
def created(path: Path) -> Iterator[Path]:
    """A folder to fill, beside `path`. It is renamed to `path` at the end, or removed on failure.
    What a killed process left of the same folder is removed.

    Raises:
      UserError: `path` exists, or cannot be created.
    """
    if path.exists():
        raise UserError(f"{path} exists; remove it or name a new folder")
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        for left in _left(partial.parent, path.name):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}; name another folder") from None
    try:
        yield partial
        files.sync_all(partial)
        partial.rename(path)
        files.sync(partial.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _left(parent: Path, name: str) -> list[Path]:
    """Partial folders for `name` whose processes have ended. A folder with this process's id was
    left by an earlier process with the same id.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.(\d+)\.partial")
    named = [(path, pattern.fullmatch(path.name)) for path in parent.iterdir()]
    return [path for path, found in named if found and not _is_other_alive(int(found[1]))]


def _is_other_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True


class Tensors:
    """The tensors of a folder: `headers` by name, and each tensor read on demand.

    Raises:
      UserError: there are no safetensors, a shard is missing, damaged or cut short, or the index
      disagrees with the shards.
    """

    def __init__(self, folder: Path) -> None:
        self._open: dict[Path, Any] = {}
        self.headers: dict[str, Header] = {}
        if (folder / INDEX).exists():
            self._read_index(folder)
        elif (folder / SINGLE).exists():
            self._read_file(folder / SINGLE)
        elif found := sorted(p.name for pattern in PICKLED for p in folder.glob(pattern)):
            raise UserError(
                f"{folder} holds {found[0]} and no safetensors; pickled weights are never read: "
                "convert them to safetensors first"
            )
        else:
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a model's folder")

    def read(self, name: str) -> np.ndarray:
        """The tensor with the dtype it is stored in."""
        try:
            return self._open[self.headers[name].file].get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(self.headers[name].file, error) from None

    def _read_index(self, folder: Path) -> None:
        weight_map = files.read_json(folder / INDEX, AGAIN).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} has no weight_map; get the file again")
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise UserError(f"{folder / INDEX} names {shard!r}, which is not a file beside it")
            if not (folder / shard).exists():
                raise UserError(f"{folder} lacks the shard {shard} that {INDEX} names; get it")
            self._read_file(folder / shard)
        listed = {name: folder / str(shard) for name, shard in weight_map.items()}
        for name in sorted(listed.keys() | self.headers.keys()):
            if name not in listed or name not in self.headers:
                where = "no shard" if name in listed else self.headers[name].file.name
                lacks = "" if name in listed else ", which it does not list"
                raise UserError(
                    f"{folder / INDEX}: {where} holds {name!r}{lacks}; get the folder again"
                )
            if listed[name] != self.headers[name].file:
                raise UserError(
                    f"{folder / INDEX} has {name!r} in {listed[name].name}, but it is in "
                    f"{self.headers[name].file.name}; get the folder again"
                )

    def _read_file(self, path: Path) -> None:
        try:
            # With pread: pages of a memory-mapped file would count as memory of this process.
            opened = safetensors.safe_open(path, framework="np", backend="pread")
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise UserError(
                        f"{path}: {name} is stored as {kind}; this reads {', '.join(DTYPES)}"
                    )
                if name in self.headers:
                    other = self.headers[name].file.name
                    raise UserError(f"{path}: {name} is in {other} too; get the folder again")
                self.headers[name] = Header(path, DTYPES[kind], tuple(part.get_shape()))
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        self._open[path] = opened


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or cut short: {error}; get the file again")


def parse_size(text: str) -> int:
    """ "4GB" -> 4e9 bytes.

    Raises:
      UserError: the text is not a size, or the size is zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    size = round(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise UserError(f"max_shard_size={text!r} is not a size; write 500MB or 4GB")
    return size


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into runs of at most `limit` bytes. A larger tensor is a run of its
    own.
    """
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= size
    return found


def write_tensors(
    folder: Path, sizes: Mapping[str, int], tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> None:
    """Writes `tensors`, which must come in the order of `sizes` (bytes by name). One shard is held
    in memory. If there are several shards, an index is written too.
    """
    parts = shards(sizes, limit)
    files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = [SINGLE] if len(parts) == 1 else files
    source = iter(tensors)
    with WeightsBar("writing", sum(sizes.values())) as bar:
        for file, names in zip(files, parts, strict=True):
            held: dict[str, np.ndarray] = {}
            for wanted in names:
                name, value = next(source)
                assert (name, value.nbytes) == (wanted, sizes[wanted]), (name, wanted)
                held[name] = np.ascontiguousarray(value)
                del value
                bar.advance(sizes[name])
            save_file(held, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library makes it readable by its owner only
    if len(parts) > 1:
        weight_map = {n: file for file, names in zip(files, parts, strict=True) for n in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
