"""Every test sees eight CPU devices, unless the run selects real ones (-m gpu, -m tpu).

Compilation takes most of the time of these tests. Two things shorten it: the flags in `QUICKLY`
make XLA compile in a third of the time, and a cache of executables, kept for the length of the run,
lets a test use what another one compiled.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import pytest

from tests import devices

CACHE = "JAX_COMPILATION_CACHE_DIR"
# XLA compiles with its older loop emitters in a third of the time that the new ones take, and LLVM
# optimises little. The processes that tests start get these flags too.
QUICKLY = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_backend_optimization_level=1",
)
# A compiled CPU program takes some hundred memory maps. Linux allows a process 65,530 of them; one
# more makes XLA crash.
MAPS, MANY_MAPS, LOOK_EVERY = Path("/proc/self/maps"), 30_000, 20
LONGEST = (
    "test_processes.py",
    "test_compare.py",
    "test_train.py",
    "test_round_trip.py",
    "test_checkpoint.py",
    "test_formats.py",
    "test_resume.py",
    "test_meshes.py",
)
# A background job (`pytest &`, nohup) ignores these signals, and the processes that tests start
# would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
_made = pytest.StashKey[str]()
_ended = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    if devices.selected(config.option.markexpr) is None:
        os.environ["XLA_FLAGS"] = _with_flags(os.environ.get("XLA_FLAGS", ""), QUICKLY)
        _set("JAX_PLATFORMS", "cpu")
        _set("JAX_NUM_CPU_DEVICES", os.environ.get("JAX_NUM_CPU_DEVICES", "8"))
        if CACHE not in os.environ:  # the first of pytest-xdist's processes makes it
            os.environ[CACHE] = config.stash[_made] = tempfile.mkdtemp(prefix="executables-")
        _set(CACHE, os.environ[CACHE])
        _set("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    else:  # pytest-xdist's processes share the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _with_flags(given: str, flags: Iterable[str]) -> str:
    """XLA_FLAGS, with those of `flags` added that the user has not set."""
    added = (flag for flag in flags if flag.partition("=")[0] not in given)
    return " ".join([*given.split(), *added])


def _set(name: str, value: str) -> None:
    """Sets it for the processes that tests start, and for this one if a plugin has imported JAX."""
    os.environ[name] = value
    kind = type(getattr(jax.config, name.lower()))
    jax.config.update(name.lower(), kind(value) if kind in (int, float) else value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first. Otherwise one process would wait at the end while the other
    still runs one of them (launch/test: --no-loadscope-reorder).
    """
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = devices.selected(item.config.option.markexpr)
    if wanted and jax.default_backend() != wanted:
        pytest.skip(f"it needs a {wanted.upper()}; JAX finds {jax.default_backend()} here")


def pytest_runtest_teardown() -> None:
    if next(_ended) % LOOK_EVERY or not MAPS.exists():
        return
    with MAPS.open("rb") as lines:
        if sum(1 for _ in lines) > MANY_MAPS:
            jax.clear_caches()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _made in config.stash:
        shutil.rmtree(config.stash[_made], ignore_errors=True)
        del os.environ[CACHE]
