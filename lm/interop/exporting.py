"""Exports a run as a folder for transformers if that has a class for the model, or else as a folder
of our own (README.md).

    config.json, tokenizer.json, tokenizer_config.json, generation_config.json
    model.safetensors, or shards of at most max_shard_size and model.safetensors.index.json

Weights are read from the checkpoint one leaf at a time, without the optimizer's state, and a shard
is written when it is full. Memory: one leaf, both as stored and as float32, and one shard. For
8.0e9 parameters the leaf is a feed-forward matrix of all layers, 3.5 and 7.0 GiB, and the shard is
4 GB.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_dtypes import bfloat16

from lm import files
from lm.build import Build
from lm.config import UserError, nearest, to_mapping
from lm.data import tokenizers
from lm.data.tokenizers import Tokenizer
from lm.interop import folder, hf_config, hf_tokenizer, layout
from lm.interop.layout import Entry
from lm.run import checkpoint, formats

KEY = "espalier"
ARCHITECTURE = "EspalierForCausalLM"
FORMAT = formats.FORMAT  # the format of a configuration's sections
TOKENIZER = "espalier_tokenizer.json"
RANKS = "tokenizer.tiktoken"
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": bfloat16}
ORIGIN = "hf"  # a folder in an imported run: the small files it came from


class Exported(NamedTuple):
    """What was exported. `architecture` is that of the folder, and `size` its bytes of weights.
    `obstacle` says why no class of transformers fits the model; None if one does.
    """

    architecture: str
    obstacle: str | None
    size: int


def run(
    path: Path, out: Path, *, built: Build, dtype: str, max_shard_size: str, longest: int = 0
) -> Exported:
    """Fills the empty folder `out` from the checkpoint folder `path`, whose model is `built`.
    `longest` is written as max_position_embeddings; 0 means that of the folder the run was imported
    from, or else the context length of the run.

    Raises:
      UserError: the dtype or the size is invalid, or the checkpoint is damaged.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    limit = folder.parse_size(max_shard_size)
    workdir = path.parent.parent
    origin = workdir / ORIGIN
    theirs = origin / "config.json"
    known = files.read_json(theirs, folder.AGAIN) if theirs.exists() else {}
    longest = longest or known.get("max_position_embeddings") or built.config.data.context_length
    obstacle = hf_config.obstacle(built)
    if obstacle is None:
        config, entries = hf_config.to_transformers(built, longest), layout.transformers(built)
    else:
        config, entries = to_own(built, longest), layout.own(built)
        shutil.copyfile(workdir / checkpoint.TOKENIZER, out / TOKENIZER)
    tokenizer = tokenizers.load(workdir / checkpoint.TOKENIZER)
    ends = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end_of_text,
        "pad_token_id": None,
    }
    ids = {key: known.get(key, default) for key, default in ends.items()}
    _write(out / "config.json", config | ids | {"dtype": dtype, "torch_dtype": dtype})
    _write_tokenizer(out, workdir, tokenizer, longest)
    if not (out / "generation_config.json").exists():
        _write(out / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    kind = np.dtype(DTYPES[dtype])
    sizes = {entry.name: math.prod(entry.shape) * kind.itemsize for entry in entries}
    folder.write_tensors(out, sizes, _tensors(path, built, entries, kind), limit)
    return Exported(config["architectures"][0], obstacle, sum(sizes.values()))


def _tensors(
    path: Path, built: Build, entries: list[Entry], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `entries`, leaf by leaf; a leaf is freed before the next one is read."""
    held, leaf = "", np.zeros(0)
    for entry in entries:
        if entry.leaf != held:
            del leaf
            wanted = layout.subtree(built.abstract_state.params, entry.leaf)
            (array,) = jax.tree.leaves(checkpoint.read_params(path, wanted))
            held, leaf = entry.leaf, np.asarray(array)
            del array
        # Always a copy, even if nothing changes: a view would keep the whole leaf alive.
        yield entry.name, entry.take(leaf).astype(dtype, order="C", copy=True)


def _write_tokenizer(out: Path, workdir: Path, tokenizer: Tokenizer, longest: int) -> None:
    """Copies the tokenizer files that the run was imported with, or else converts our tokenizer."""
    origin = workdir / ORIGIN
    for path in sorted(origin.glob("*.json")):
        if path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    if not (out / "tokenizer.json").exists():
        payload = hf_tokenizer.payload(workdir / checkpoint.TOKENIZER)
        text = hf_tokenizer.to_json(tokenizer, payload)
        (out / "tokenizer.json").write_text(text, encoding="utf-8")
        _write(out / "tokenizer_config.json", hf_tokenizer.config(tokenizer, text, longest))


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def to_own(built: Build, longest: int) -> dict[str, Any]:
    """config.json of a folder of our own. It has the sizes under their usual names for people who
    look at them, and under "espalier" the sections of our configuration that `from_own` reads.
    """
    values = to_mapping(built.config)
    tokenizer = {k: x for k, x in values["data"]["tokenizer"].items() if k != "path"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": KEY,
        "vocab_size": tokenizer["vocab_size"],
        "hidden_size": values["model"]["width"],
        "num_hidden_layers": values["model"]["num_layers"],
        "max_position_embeddings": longest,
        KEY: {
            "format": FORMAT,
            "model": values["model"],
            "mup": values["mup"],
            "tokenizer": tokenizer,
        },
    }


def from_own(hf: Mapping[str, Any], base: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`base` with the model, muP and vocabulary that `to_own` wrote.

    Raises:
      UserError: a part is missing, or its format is later than this version's.
    """
    own = hf[KEY]
    needed = {"format", "model", "mup", "tokenizer"}
    if not isinstance(own, dict) or (lacking := sorted(needed - own.keys())):
        lacking = lacking if isinstance(own, dict) else [KEY]
        raise UserError(f"{where}: {KEY} lacks {lacking[0]}; get the file again")
    for key in ("model", "mup", "tokenizer"):
        if not isinstance(own[key], Mapping):
            raise UserError(
                f"{where}: {KEY}.{key}={own[key]!r} is not an object; get the file again"
            )
    if own["format"] not in (1, FORMAT):
        raise UserError(
            f"{where}: format {own['format']}, this reads up to {FORMAT}; update Espalier"
        )
    kind, size = (own["tokenizer"].get(key) for key in ("kind", "vocab_size"))
    paths = {"bytes": "", "bpe": "", "json": "tokenizer.json", "tiktoken": RANKS}
    if not isinstance(kind, str) or kind not in paths:
        raise UserError(f"{where}: unknown tokenizer {kind!r}; {nearest(str(kind), paths)}")
    keys = ("precision", "remat", "kept", "unroll", "cpu_unroll")
    kept = {key: base["model"][key] for key in keys if key in base["model"]}
    values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    earlier = formats.MODEL_OF_1 if own["format"] == 1 else {}
    values |= {"model": {**earlier, **own["model"], **kept}, "mup": own["mup"]}
    named = {k: own["tokenizer"][k] for k in tokenizers.Options._fields if k in own["tokenizer"]}
    values["data"]["tokenizer"] = {"kind": kind, "path": paths[kind], "vocab_size": size, **named}
    context = values["data"]["context_length"]
    longest = hf_config.number(hf, "max_position_embeddings", where, int, context)
    values["data"]["context_length"] = min(longest, context)
    return values
