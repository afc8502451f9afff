"""Eight CPU devices for every test, unless the run selects real ones (-m gpu, -m tpu). Most of the
time of these tests is the compiler's: here it takes a third of it (`QUICKLY`), and what one test
compiles, another need not: a folder of executables that lasts as long as the run.
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
# XLA's older emitters of loops take a third of the time of its new ones, and LLVM optimises little.
# For the processes that tests start too.
QUICKLY = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_backend_optimization_level=1",
)
# A program on the CPU is some hundred maps of memory, of which Linux gives a process 65,530; the
# one beyond them ends it, somewhere inside XLA.
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
# What a shell has a background job ignore (`pytest &`, nohup), the processes of tests would too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
_made = pytest.StashKey[str]()
_ended = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    if devices.selected(config.option.markexpr) is None:
        os.environ["XLA_FLAGS"] = _with_flags(os.environ.get("XLA_FLAGS", ""), QUICKLY)
        _set("JAX_PLATFORMS", "cpu")
        _set("JAX_NUM_CPU_DEVICES", os.environ.get("JAX_NUM_CPU_DEVICES", "8"))
        if CACHE not in os.environ:  # of pytest-xdist's processes the first makes it
            os.environ[CACHE] = config.stash[_made] = tempfile.mkdtemp(prefix="executables-")
        _set(CACHE, os.environ[CACHE])
        _set("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    else:  # pytest-xdist's processes share the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _with_flags(given: str, flags: Iterable[str]) -> str:
    """XLA_FLAGS with those of `flags` that the user has not given."""
    added = (flag for flag in flags if flag.partition("=")[0] not in given)
    return " ".join([*given.split(), *added])


def _set(name: str, value: str) -> None:
    """For the processes that tests start, and for this one, where a plugin has imported JAX."""
    os.environ[name] = value
    kind = type(getattr(jax.config, name.lower()))
    jax.config.update(name.lower(), kind(value) if kind in (int, float) else value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, or one process waits at the end while the other is in one of them
    (launch/test: --no-loadscope-reorder).
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
