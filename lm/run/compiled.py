"""Compiled programs that are kept in the data folder, so that a launch which compiles what an
earlier one compiled reads it instead: a resumed run, an evaluation, the next prompt.

    <data_dir>/compiled/<jaxlib's version>-<processor>/    JAX's compilation cache

A program is the same whether it was compiled or read: JAX's key holds the program, the compiler's
options and version, and the device. A CPU's program may use instructions that another processor
lacks, and a data folder may be shared; so every processor has a folder of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from lm.run import record

MOST_BYTES = 1 << 30  # of one folder; beyond, what was not read for longest is removed
SHORTEST = 0.2  # seconds of compilation that are worth a file


def keep(data_dir: Path, *, is_wanted: bool) -> None:
    """From now on this process keeps what it compiles, and reads what was kept. A cache that has
    been chosen otherwise stays: the variable JAX_COMPILATION_CACHE_DIR, or a study's own.
    """
    if not is_wanted or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder(data_dir)))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    compilation_cache.reset_cache()  # at its first compilation JAX has settled whether to use one


def folder(data_dir: Path) -> Path:
    """Where this version of the compiler keeps programs for this processor."""
    processor = re.sub(r"\W+", "_", record.cpu()).strip("_") or "unknown"
    return data_dir / "compiled" / f"{jaxlib.version.__version__}-{processor}"
