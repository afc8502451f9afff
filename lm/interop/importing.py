"""Imports a folder of transformers, or one that `exporting` wrote, as a run folder.

    config.json -> our configuration -> build (shapes only)
    headers of all tensors checked against it, the embedding's before anything is built
    one leaf at a time: read its tensors, stack, to the device -> checkpoint of step 0, weights only

Weights are stored in their own type (bfloat16 stays bfloat16, mixed types become float32) and read
back as float32. Memory: all weights once in their own type, 15.0 GiB for 8.0e9 weights of 16 bits.
If the device is not this machine's CPU, host memory only holds one leaf at a time, at most 3.5 GiB
for such a model (one of the feed-forward's matrices, of all layers).

The run folder also holds `hf/`, the small files it came from, and `experiment.py`, a configuration
that continues training from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import build as build_lib
from lm import files
from lm import model as model_lib
from lm.build import Build
from lm.config import Config, TokenizerConfig, UserError, from_mapping
from lm.data import tokenizers
from lm.data.tokenizers import Tokenizer
from lm.interop import exporting, folder, hf_config, hf_tokenizer, layout, weights
from lm.interop.exporting import ORIGIN
from lm.interop.folder import Tensors
from lm.interop.layout import Entry
from lm.run.progress import WeightsBar

KEPT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
# Buffers that old versions saved; they follow from the configuration.
COMPUTED = ".rotary_emb.inv_freq"
TIED = ("lm_head.weight", "model.embed_tokens.weight")

EXPERIMENT = '''"""Continues training the weights beside this file, in a new folder:

    espalier train --config={path} --workdir=NEW --config.run.length="1e6 tokens"

Set the data, the schedule and the batch; the model is that of config.json here.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict, FieldReference


def _frozen(value):
    """Lists as tuples, which flags can set."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def get_config() -> ConfigDict:
    here = Path(__file__).resolve().parent
    values = json.loads((here / "config.json").read_text(encoding="utf-8"))
    values = _frozen(values | {"init_from": str(here)})
    pattern = values["model"]["pattern"]
    values["model"]["pattern"] = FieldReference(pattern, field_type=object)
    return ConfigDict(values)
'''


class Imported(NamedTuple):
    """What was read, for the record of the run. `notes` are lines to show the user."""

    build: Build
    tokenizer: Tokenizer
    source: dict[str, Any]
    notes: list[str]


def run(source: Path, base: Mapping[str, Any], *, workdir: Path, partial: Path) -> Imported:
    """Fills `partial`, which will be renamed to `workdir`, from the folder `source`. `base` is a
    whole configuration as nested values. It is kept except for model, mup and data.tokenizer; of
    the model its precision, remat, kept and unroll are kept too.

    Raises:
      UserError: the folder lacks something, or holds something that cannot be read.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    where = source / "config.json"
    if not where.exists():
        what = "so it is not a Hugging Face folder; name one"
        raise UserError(f"{source} has no config.json, {what}")
    hf = files.read_json(where, folder.AGAIN)
    is_own = exporting.KEY in hf
    values = (exporting.from_own if is_own else hf_config.from_transformers)(hf, base, where)
    tokenizer = _tokenizer(source, values, is_own)
    origin = partial / ORIGIN
    _keep(source, origin, values)
    if values["data"]["tokenizer"]["path"]:
        path = workdir.absolute() / ORIGIN / values["data"]["tokenizer"]["path"]
        values["data"]["tokenizer"]["path"] = str(path)
    with _naming(where):
        config = from_mapping(values)
    tensors = Tensors(source)
    _check_table(tensors, config, source, is_own)
    with _naming(where):
        built = build_lib.local(config)
    entries = layout.own(built) if is_own else layout.transformers(built)
    check_tensors(tensors, entries, source)
    params, broken = read_params(built, tensors, entries)
    weights.save(partial, built.config, params)
    write_experiment(partial, workdir)
    name = exporting.ARCHITECTURE if is_own else hf_config.architecture(hf, where)
    facts = {"imported_from": name, "stored_as": _stored_as(params)}
    notes = [] if is_own else [*_of_ignored(hf, where), *_of_start(source, hf, tokenizer)]
    notes = [*_of_end(hf, tokenizer), *notes, *_of_broken(broken)]
    return Imported(built, tokenizer, facts, notes)


@contextlib.contextmanager
def _naming(where: Path) -> Iterator[None]:
    """Adds the file to error messages, which name only our keys."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_experiment(partial: Path, workdir: Path) -> None:
    """Writes experiment.py in a folder that will become `workdir`."""
    text = EXPERIMENT.replace("{path}", str(workdir / "experiment.py"))
    (partial / "experiment.py").write_text(text, encoding="utf-8")


def read_params(built: Build, tensors: Tensors, entries: list[Entry]) -> tuple[Any, list[str]]:
    """The tree of parameters, read leaf by leaf; and the names of tensors with NaN or infinity."""
    kinds = {tensors.headers[entry.name].dtype for entry in entries}
    dtype = kinds.pop() if len(kinds) == 1 else np.float32
    by_leaf: dict[str, list[Entry]] = {}
    for entry in entries:
        by_leaf.setdefault(entry.leaf, []).append(entry)
    placed = jax.tree.leaves(built.abstract_state.params)
    arrays, broken = [], []
    sizes = [math.prod(entry.shape) * np.dtype(dtype).itemsize for entry in entries]
    with WeightsBar("reading", sum(sizes)) as bar:
        for (name, shape), like in zip(layout.leaves(built).items(), placed, strict=True):
            leaf = _zeros(shape, np.dtype(dtype))
            for entry in by_leaf[name]:
                value = tensors.read(entry.name)
                if not np.isfinite(value).all():
                    broken.append(entry.name)
                entry.put(value, leaf)
                del value
                bar.advance(math.prod(entry.shape) * leaf.itemsize)
            arrays.append(jax.block_until_ready(jax.device_put(leaf, like.sharding)))
            del leaf
    tree = jax.tree.unflatten(jax.tree.structure(built.abstract_state.params), arrays)
    return tree, broken


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array aligned to 64 bytes: then the CPU device uses its memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_table(tensors: Tensors, config: Config, source: Path, is_own: bool) -> None:
    """Checks the embedding's shape before a model is made: absurd sizes would fail to make one."""
    size, width = config.data.tokenizer.vocab_size, config.model.width
    name = "embed.table" if is_own else layout.TABLES["embed/table"]
    shape = (model_lib.padded_vocab_size(size) if is_own else size, width)
    if name in tensors.headers and tensors.headers[name].shape != shape:
        raise _other_shape(source, name, tensors.headers[name].shape, shape)


def _other_shape(source: Path, name: str, found: Any, wanted: Any) -> UserError:
    return UserError(
        f"{source}: {name} has shape {list(found)}, its config.json says {list(wanted)}"
    )


def check_tensors(tensors: Tensors, entries: list[Entry], source: Path) -> None:
    """Checks names and shapes before any tensor is read.

    Raises:
      UserError: a tensor is missing or unexpected, or has another shape.
    """
    found, wanted = dict(tensors.headers), {entry.name: entry.shape for entry in entries}
    head, table = TIED
    if head in found and table in wanted and head not in wanted:
        if not np.array_equal(tensors.read(head), tensors.read(table)):
            raise UserError(
                f"{source}: tie_word_embeddings is true and {head} differs from {table}; set it to "
                "false in config.json"
            )
        del found[head]
    found = {name: header for name, header in found.items() if not name.endswith(COMPUTED)}
    if missing := sorted(wanted.keys() - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source} lacks the tensor {missing[0]}{more}; get the folder again")
    if extra := sorted(found.keys() - wanted.keys()):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{source} has the tensor {extra[0]}{more}, which its config.json's model does not have"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise _other_shape(source, name, found[name].shape, shape)


def _tokenizer(source: Path, values: dict[str, Any], is_own: bool) -> Tokenizer:
    if is_own:
        tokenizer = tokenizers.load(source / exporting.TOKENIZER)
        usual = tokenizers.Options()._asdict()
        config = TokenizerConfig(**usual | values["data"]["tokenizer"])
        tokenizers.check_vocab_size(tokenizer, config)
        return tokenizer
    path = source / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{source} has no tokenizer.json; save the tokenizer's fast form there")
    tokenizer = tokenizers.create(
        TokenizerConfig(
            kind="json", path=str(path), vocab_size=1 << 31, pattern="gpt2", end_of_text="", bos=""
        )
    )
    size = values["data"]["tokenizer"]["vocab_size"]
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, vocab_size={size} in "
            "config.json; get the folder again"
        )
    values["data"]["tokenizer"]["path"] = path.name
    return tokenizer


def _keep(source: Path, origin: Path, values: Mapping[str, Any]) -> None:
    """Copies the small files into hf/, including the tokenizer."""
    origin.mkdir()
    for name in KEPT:
        if (source / name).exists():
            shutil.copyfile(source / name, origin / name)
    if values["data"]["tokenizer"]["path"] == exporting.RANKS:
        text = json.loads((source / exporting.TOKENIZER).read_text(encoding="utf-8"))["payload"]
        (origin / exporting.RANKS).write_text(text, encoding="utf-8")


def _stored_as(params: Any) -> str:
    return str(jax.tree.leaves(params)[0].dtype)


def _of_ignored(hf: Mapping[str, Any], where: Path) -> list[str]:
    keys = ", ".join(hf_config.ignored(hf, where))
    return (
        [f"ignored in config.json, since transformers does not compute with them: {keys}"]
        if keys
        else []
    )


def _of_end(hf: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    ends = hf.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if ends == [None] or tokenizer.end_of_text in ends:
        return []
    return [
        f"eos_token_id={hf['eos_token_id']} in config.json, the tokenizer's end of text is "
        f"{tokenizer.end_of_text}: documents end, and generation stops, at the latter"
    ]


def _of_start(source: Path, hf: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Notes on a start token that tokenizer.json puts first, or that config.json names."""
    first = hf_tokenizer.first_ids(source / "tokenizer.json")
    named = hf.get("bos_token_id")
    if not first and named in (None, tokenizer.end_of_text):
        return []
    message = f"tokenizer.json puts {first} before texts" if first else f"bos_token_id={named}"
    return [
        f"{message}; here no text begins with a start token, so a model that was trained with one "
        "does worse at first tokens (lm/interop/README.md)"
    ]


def _of_broken(names: list[str]) -> list[str]:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    message = "hold values that are not finite" if more else "holds values that are not finite"
    return [f"{names[0]}{more} {message}; the outputs of the model may be NaN"] if names else []
