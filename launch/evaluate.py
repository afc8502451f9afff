"""Asks tasks of a checkpoint: bits per byte of its validation sets, and any of lm/evals.

    python -m launch.evaluate --checkpoint=WORKDIR [--task=position] [--task=blimp.path=FILE ...]

--task=TASK adds a task with its defaults, --task=TASK.OPTION=VALUE sets an option, and
--task=LABEL.task=TASK gives the same task a second time. Tasks of the run's configuration are asked
too. --source=NAME:PATH adds a validation set (PATH as data.sources.*.path takes it), of each
max_tokens are scored, evenly spread. --layer=softmax.window=512 changes options that have no
parameters: with global_tokens and distance_ceiling a RoPE model reads on as LM-Infinite does.
"""

import dataclasses
import json
import re

from absl import flags
from rich.console import Console

from launch import cli
from lm.config import SourceConfig, UserError

_LAYER = cli.layer_flag()
_TASK = flags.DEFINE_multi_string("task", [], "TASK or LABEL.OPTION=VALUE; may be repeated")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of prepared data, else ESPALIER_DATA")
_SOURCE = flags.DEFINE_multi_string("source", [], "another set, NAME:PATH; may be repeated")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "of each set; 0: the run's", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file to write")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    extra = dict(map(_source, _SOURCE.value))
    if len(extra) < len(_SOURCE.value):
        raise UserError("--source gives a name twice; choose another name")
    path, layers = cli.path("checkpoint", _CHECKPOINT.value), cli.layers(_LAYER.value)
    asked, out = cli.tasks(_TASK.value), cli.out_file("out", _OUT.value)
    from lm import evals, files  # after the flags: imports jax
    from lm.data import loader, prepare
    from lm.evals import bits_per_byte
    from lm.evaluation import evaluate
    from lm.evaluation.scoring import Scorer
    from lm.run import checkpoint
    from lm.run.progress import ScoringBar

    tasks = evals.create(asked, "--task")
    loaded = checkpoint.load(path, layers)
    config, tokenizer = loaded.config, loaded.tokenizer
    tasks = evals.create(config.evaluate.tasks, "evaluate.tasks") | tasks
    if clash := sorted(extra.keys() & config.data.sources.keys()):
        raise UserError(f"--source={clash[0]}:... is a source of the run; choose another name")
    data = dataclasses.replace(config.data, sources={**config.data.sources, **extra})
    data_dir = prepare.resolve_data_dir(_DATA_DIR.value)
    if bits_per_byte.has_sets(data) or not tasks:
        tasks = evals.create({"bits_per_byte": {}}, "--task") | tasks
    prepared = prepare.prepare(data, data_dir, tokenizer=tokenizer)
    saved = checkpoint.read_loader(checkpoint.locate(path)).get("identity", {})
    loader.tell_changed(saved, loader.held_out(prepared, config.data))
    max_tokens = _MAX_TOKENS.value or config.evaluate.max_tokens
    questions = evaluate.prepare(tasks, evals.Given(tokenizer, prepared, data, max_tokens))
    with ScoringBar({k: evaluate.num_tokens(x) for k, x in questions.items()}) as bar:
        results = evaluate.run(questions, Scorer(loaded.build, loaded.params), advance=bar.advance)
    Console().print(*evaluate.tables(results))
    if out:
        found = {"step": loaded.step, "layers": layers, "tasks": evaluate.to_mapping(results)}
        with files.one_line(f"--out={_OUT.value}"):
            files.replace(out, json.dumps(found, indent=1) + "\n")


def _source(text: str) -> tuple[str, SourceConfig]:
    name, _, path = text.partition(":")
    if not re.fullmatch(r"[\w-]+", name) or not path:
        raise UserError(f"--source={text!r} must be NAME:PATH, the name a word")
    return name, SourceConfig(path=path, text_key="text", weight=0.0, valid_fraction=1.0)


if __name__ == "__main__":
    cli.run(main)
