"""Where and when numbers were taken: enough to take them again."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from typing import Any

import jax

from lm.run import record

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe(module: str) -> dict[str, Any]:
    """The head of a result file; `module` is what `python -m` started. Where it worked is of no use
    to who repeats it, and stays out.
    """
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    commit, _, changes = record.commit().partition("-")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": re.sub(r"(--workdir[= ])\S+", r"\1DIR", command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": bool(changes),
        "device": jax.devices()[0].device_kind,
        "cpu": record.cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": versions | {"python": platform.python_version()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
