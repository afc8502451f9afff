"""Scores a checkpoint on the validation sets of its run, and on any others.

    python -m launch.evaluate --checkpoint=WORKDIR [--source=NAME:PATH ...] [--out=eval.json]

PATH is what data.sources.*.path takes: `stdlib`, a glob of text files, Parquet. Of each set at most
max_tokens are scored, evenly spread. Loss is nats per token, end of text included; bits per byte
leave it out. --layer=softmax.window=512 and the like change options of layers that have no
parameters: with global_tokens and distance_ceiling a plain RoPE model reads on as LM-Infinite does.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from launch import cli
from lm.config import SourceConfig, UserError

_LAYER = cli.layer_flag()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of prepared data, else ESPALIER_DATA")
_SOURCE = flags.DEFINE_multi_string("source", [], "another set, NAME:PATH; may be repeated")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "of each set; 0: the run's", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file to write")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    extra: dict[str, SourceConfig] = {}
    for name, source in map(_source, _SOURCE.value):
        if name in extra:
            raise UserError(f"--source={name}:... is given twice; choose another name")
        extra[name] = source
    path, layers = cli.path("checkpoint", _CHECKPOINT.value), cli.layers(_LAYER.value)
    from lm import checkpoint, evaluate, record  # after the flags: imports jax
    from lm.data import loader, prepare

    loaded = checkpoint.load(path, layers)
    config, tokenizer = loaded.config, loaded.tokenizer
    if clash := sorted(extra.keys() & config.data.sources.keys()):
        raise UserError(f"--source={clash[0]}:... is a source of the run; choose another name")
    data = dataclasses.replace(config.data, sources={**config.data.sources, **extra})
    data_dir = prepare.resolve_data_dir(_DATA_DIR.value)
    prepared = prepare.prepare(data, data_dir, tokenizer=tokenizer)
    max_tokens = _MAX_TOKENS.value or config.eval.max_tokens
    sets = loader.validation_batches(prepared, data, data.batch_size, max_tokens)
    found: dict[str, Any] = {}
    for name, batches in sets.items():
        built = loaded.build
        report = evaluate.evaluate(
            built.token_nll, built.put, loaded.params, batches, tokenizer.token_bytes
        )
        found[name] = report.to_mapping(tuple(data.sources))
    Console().print(*evaluate.tables(found))
    if _OUT.value:
        text = json.dumps({"step": loaded.step, "layers": layers, "sets": found}, indent=1)
        try:
            record.replace(Path(_OUT.value).expanduser(), text + "\n")
        except OSError as error:
            raise UserError(f"--out={_OUT.value}: {error.strerror}") from None


def _source(text: str) -> tuple[str, SourceConfig]:
    name, _, path = text.partition(":")
    if not re.fullmatch(r"[\w-]+", name) or not path:
        raise UserError(f"--source={text!r} must be NAME:PATH, the name a word")
    return name, SourceConfig(path=path, text_key="text", weight=0.0, valid_fraction=1.0)


if __name__ == "__main__":
    cli.run(main)
