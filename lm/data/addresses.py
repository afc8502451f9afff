"""Files at addresses of object stores and other file systems (s3://, gs://, https://, memory://),
read with fsspec. Most kinds of address need another package (s3fs, gcsfs, ...), which also finds
the credentials.

Globs follow fsspec's rules. A file's `version` is a digest of what the store reports about it:
size, time, entity tag.
"""

from __future__ import annotations

import dataclasses
import datetime
import glob
import hashlib
import posixpath
from typing import Any

from lm.config import UserError
from lm.readers import File, package


@dataclasses.dataclass(frozen=True)
class Address:
    """A file of an fsspec file system; it has the `open` method of a path."""

    url: str
    system: Any
    path: str

    def __str__(self) -> str:
        return self.url

    def open(self, mode: str = "rb") -> Any:
        return self.system.open(self.path, mode)

    def state(self) -> tuple[int, str]:
        """The size in bytes, and a version that changes when the content changes."""
        return _state(self.system.info(self.path))


def is_address(path: str) -> bool:
    return "://" in path


def listed(url: str) -> list[File]:
    """The files that an address or a glob of addresses names, sorted by name.

    Raises:
      UserError: fsspec, or the package of this kind of address, is not installed.
    """
    fsspec = package("fsspec", f"{url} is an address")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition("://")[0]
        raise UserError(f"{kind}:// needs a package that is missing: {error}") from None
    if glob.has_magic(path):
        found = system.glob(path, detail=True)
    else:
        found = {path: system.info(path)} if system.exists(path) else {}
    parts = path.split("/")
    literal = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = "/".join(parts[:literal])
    return [
        File(
            Address(system.unstrip_protocol(name), system, name),
            posixpath.relpath(name, root or "/"),
            *_state(info),
        )
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]


def _state(info: dict[str, Any]) -> tuple[int, str]:
    facts = repr(sorted((str(key), _plain(value)) for key, value in info.items()))
    return int(info.get("size") or 0), hashlib.sha256(facts.encode()).hexdigest()[:16]


def _plain(value: Any) -> str:
    """A value as text. Some stores give a time as a number in a listing and as an object elsewhere;
    both become seconds."""
    if isinstance(value, datetime.datetime):
        value = value.timestamp()
    return f"{value:.3f}" if isinstance(value, float) else str(value)
