"""The plain JSON items of a checkpoint (meta, loader and config), and checks of their digests.

    <step>/meta/metadata      what the checkpoint is: `Meta`, and the digest of meta itself
    <step>/loader/metadata    place in the training stream, and the identity of that stream
    <step>/config/metadata    the configuration (lm/run/formats.py)

A digest is the SHA-256 of the values, with sorted keys. Meta holds the digests of loader and
config. Checkpoints from before there were digests have neither "items" nor "sha256"; they are not
checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lm.metrics import Records

OTHERS = ("loader", "config")
NONE: Mapping[str, str] = MappingProxyType({})


class Meta(NamedTuple):
    """`tokens` seen at `step`. `decay_start` is in tokens, if a decay branched from a trunk.
    `digest` is per array, `shapes` per parameter, `items` is the digest of each plain item.
    `records` is the part of metrics.jsonl written by then, None if the checkpoint does not say.
    """

    step: int
    tokens: int
    decay_start: float | None
    digest: dict[str, int]
    shapes: dict[str, list[int]]
    items: Mapping[str, str] = NONE
    records: Records | None = None


def sha256(values: Any) -> str:
    """The digest of values as JSON stores them."""
    kept = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def plain(meta: Meta, loader: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The three items by name, as they are written."""
    others = {"loader": dict(loader), "config": dict(config)}
    values = meta._asdict() | {"items": {name: sha256(x) for name, x in others.items()}}
    values["records"] = meta.records and meta.records._asdict()
    return others | {"meta": values | {"sha256": sha256(values)}}


def read_meta(path: Path) -> Meta:
    """The meta item of a checkpoint folder.

    Raises:
      OSError, ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    values = _read(path, "meta")
    if "sha256" not in values and "items" not in values:
        return Meta(**{field: values[field] for field in Meta._fields[:5]})
    _check("meta", values, values.pop("sha256"))
    records = values.pop("records")
    return Meta(**values, records=records and Records(**records))


def read(path: Path, item: str, meta: Meta) -> dict[str, Any]:
    """Another plain item of the checkpoint folder. Raises the same as `read_meta`."""
    values = _read(path, item)
    if meta.items:
        _check(item, values, meta.items[item])
    return values


def _read(path: Path, item: str) -> dict[str, Any]:
    return json.loads((path / item / "metadata").read_text(encoding="utf-8"))


def _check(item: str, values: Mapping[str, Any], recorded: str) -> None:
    if (found := sha256(values)) != recorded:
        raise ValueError(f"digest of {item} is {found[:12]}, recorded {recorded[:12]}")
