"""Eight CPU devices for every test, unless the run selects real ones (-m gpu, -m tpu); and what one
test compiles, another need not: a folder of executables that lasts as long as the run.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile

import jax
import pytest

CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    selected = re.sub(r"not \w+", "", config.option.markexpr)
    if not re.search(r"\b(gpu|tpu)\b", selected):
        _set("JAX_PLATFORMS", "cpu")
        _set("JAX_NUM_CPU_DEVICES", os.environ.get("JAX_NUM_CPU_DEVICES", "8"))
        if CACHE not in os.environ:  # of pytest-xdist's processes the first makes it
            os.environ[CACHE] = config.stash[_made] = tempfile.mkdtemp(prefix="executables-")
        _set(CACHE, os.environ[CACHE])
        _set("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _set(name: str, value: str) -> None:
    """For the processes that tests start, and for this one, where a plugin has imported JAX."""
    os.environ[name] = value
    kind = type(getattr(jax.config, name.lower()))
    jax.config.update(name.lower(), kind(value) if kind in (int, float) else value)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _made in config.stash:
        shutil.rmtree(config.stash[_made], ignore_errors=True)
        del os.environ[CACHE]
