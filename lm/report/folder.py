"""A run folder as the report reads it. Any file may be absent: the run may have just begun."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import files, metrics
from lm.config import UserError
from lm.run import checkpoint, formats, items


@dataclasses.dataclass(frozen=True)
class Run:
    """`name` distinguishes the runs of one report; `facts` is run.json."""

    name: str
    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def series(self, key: str, over: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """Two float arrays, `over` and `key`, from the records that have the key."""
        pairs = [(r[over], r[key]) for r in self.records if key in r]
        x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
        return x, y

    def keys(self, pattern: str) -> list[str]:
        """Keys of the records like "prefix/*" or "prefix/*/suffix", in order of appearance."""
        prefix, _, suffix = pattern.partition("*")
        seen = dict.fromkeys(key for record in self.records for key in record)
        return [k for k in seen if k.startswith(prefix) and k.endswith(suffix)]

    def last(self, key: str) -> float | None:
        return next((r[key] for r in reversed(self.records) if key in r), None)

    def validation(self) -> dict[str, float]:
        """Bits per byte of each validation set at its last evaluation."""
        keys = self.keys("eval/*/bpb")
        return {key.split("/")[1]: float(self.series(key)[1][-1]) for key in keys}

    def training_seconds(self) -> float | None:
        """Time spent in steps, without records that have no time (the first after a start)."""
        steps, seconds = self.series("time/step_seconds", over="step")
        if len(steps) == 0:
            return None
        logged = np.array([record["step"] for record in self.records], dtype=float)
        at = np.searchsorted(logged, steps)
        before = np.where(at > 0, logged[at - 1], steps - 1)
        return float(((steps - before) * seconds).sum())

    def skipped(self) -> list[tuple[int, int]]:
        """(step, number) wherever the count of skipped steps rose."""
        steps, totals = self.series("optim/skipped_total", over="step")
        rises = np.diff(totals, prepend=0.0)
        return [(int(s), int(n)) for s, n in zip(steps, rises, strict=True) if n > 0]

    def flags(self) -> list[str]:
        """The command line from its first flag on, without the name of the program."""
        words = [str(word) for word in self.facts.get("command", [])]
        return list(itertools.dropwhile(lambda word: not word.startswith("-"), words))

    def overrides(self) -> set[str]:
        """Keys of the configuration that the command line set."""
        flags = self.flags()
        return {f.split("=")[0].removeprefix("--config.") for f in flags if f[:9] == "--config."}


def load(workdirs: Sequence[Path]) -> list[Run]:
    """Reads run folders. If names are equal, the parent folder is shown too.

    Raises:
      UserError: a folder is missing, holds no run, or holds a damaged file.
    """
    names = [path.resolve().name for path in workdirs]
    runs = []
    for path, name in zip(workdirs, names, strict=True):
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not any((path / f).exists() for f in ("config.json", "run.json", metrics.FILE)):
            raise UserError(
                f"{path} holds no run: neither config.json, run.json nor {metrics.FILE}"
            )
        if names.count(name) > 1:
            name = f"{path.resolve().parent.name}/{name}"
        facts = _facts(path / "run.json")
        config = _config(path / "config.json", facts.pop("config_sha256", None))
        records = _records(path, facts)
        runs.append(Run(name, path, config, facts, records, _samples(path / "samples.jsonl")))
    return runs


def _facts(path: Path) -> dict[str, Any]:
    facts = _object(path)
    recorded = facts.pop("sha256", None)
    layers = facts.get("layers", [])
    is_known = all(isinstance(x, dict) and {"layer", "mixer"} <= x.keys() for x in layers)
    is_sealed = recorded is not None or "config_sha256" in facts
    if not is_known or (is_sealed and recorded != items.sha256(facts)):
        raise UserError(f"{path} is damaged (its digest is another); restore it or remove it")
    return facts


def _records(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl. All records that the newest checkpoint counts on must be there.
    A run without a readable checkpoint is accepted too.
    """
    try:
        meta = checkpoint.newest(path)[1]
    except UserError:
        meta = None
    lost_until = facts.get("records_lost_until_step", 0)
    if meta is not None and meta.records is not None and lost_until < meta.step:
        metrics.check(path, meta.step, meta.records)
    return metrics.read(path)


def _config(path: Path, recorded: str | None) -> dict[str, Any]:
    """The configuration in the current format, so that runs of two versions can be compared."""
    found = _object(path)
    if found and recorded is not None and recorded != items.sha256(found):
        raise UserError(f"{path} is not what run.json was written with; restore it or remove it")
    return formats.upgraded(found, str(path)) if found else {}


def _object(path: Path) -> dict[str, Any]:
    return files.read_json(path, "remove it or restore it") if path.exists() else {}


def _samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with files.one_line(f"{path} is damaged", "remove it"):
        *lines, partial = path.read_bytes().split(b"\n")
        del partial  # empty if the last line is complete
        found = [json.loads(line) for line in lines]
        return [{key: x[key] for key in ("step", "kind", "prompt", "text")} for x in found]
