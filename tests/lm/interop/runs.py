"""Run folders of tiny models with random weights, and export and import as the commands do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.base import get_config
from lm import build as build_lib
from lm.build import Build
from lm.data import tokenizers
from lm.interop import exporting, folder, importing, weights
from lm.interop.exporting import Exported
from lm.interop.importing import Imported
from lm.run import checkpoint, record
from tests.lm import tiny

STANDARD = {
    "mup.parametrization": "standard",
    "mup.embedding_multiplier": 1.0,
    "mup.residual_multiplier": 1.0,
}
BYTES = {"kind": "bytes", "path": "", "vocab_size": 257}


def create(path: Path, changes: dict[str, Any]) -> Build:
    """Writes a run folder as training leaves it: softmax layers (unless changed) on bytes."""
    base = {"model.pattern": "softmax", "model.num_layers": 3, "data.tokenizer": BYTES}
    built = tiny.create(base | changes)
    params = jax.device_put(tiny.params(built))
    path.mkdir(parents=True)
    weights.save(path, built.config, params)
    tokenizer = tokenizers.create(built.config.data.tokenizer, ["some text"])
    record.write(path, built, tokenizer, {}, None)
    return built


def exported(workdir: Path, out: Path, **options: Any) -> Exported:
    """Exports a run as espalier export_hf does."""
    found = checkpoint.locate(workdir)
    built = build_lib.local(checkpoint.read_config(found))
    options = {"dtype": "float32", "max_shard_size": "4GB"} | options
    with folder.created(out) as partial:
        return exporting.run(found, partial, built=built, **options)


def imported(source: Path, workdir: Path) -> Imported:
    """Imports a folder as espalier import_hf does."""
    with folder.created(workdir) as partial:
        base = get_config().to_dict()
        found = importing.run(source, base, workdir=workdir, partial=partial)
        record.write(partial, found.build, found.tokenizer, found.source, None)
    return found


def assert_equal(a: Any, b: Any) -> None:
    """Two parameter trees are equal bit for bit, except for the padding of the vocabulary."""
    for tree in (a, b):
        assert tree["embed"]["table"].shape[0] == 384
    cut = lambda x: np.asarray(x)[:257] if x.shape[0] == 384 else np.asarray(x)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(cut, a), jax.tree.map(cut, b))
