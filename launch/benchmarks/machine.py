"""Where, when and by which command numbers were measured: enough to measure them again."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax

from lm.run import record

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe(name: str) -> dict[str, Any]:
    """The head of a result file that the command `name` writes."""
    commit, _, changes = record.commit().partition("-")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command(["espalier", name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": bool(changes),
        "device": jax.devices()[0].device_kind,
        "cpu": record.cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": versions | {"python": platform.python_version()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def command(words: Sequence[str]) -> str:
    """A command line without the folders of this machine, which mean nothing elsewhere: a workdir
    becomes DIR, a path given to an experiment DATA, and any other path its file name.
    """
    words = [
        "DIR" if before == "--workdir" else word
        for before, word in zip(("", *words), words, strict=False)
    ]
    words = [re.sub(r"^--workdir=.*", "--workdir=DIR", word) for word in words]
    words = [re.sub(r"^(--config=.*?[:,])([/~]|\.\./).*", r"\1DATA", word) for word in words]
    return shlex.join(re.sub(r"(^|=)([/~]|\.\./).*/(?=[^/])", r"\1", word) for word in words)
