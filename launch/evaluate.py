"""Evaluates a checkpoint: bits per byte and any task of lm/evals.

    espalier evaluate --checkpoint=WORKDIR [--task=position] [--task=blimp.path=FILE ...]

--task=TASK adds a task with its defaults to those of the run, --task=TASK.OPTION=VALUE sets an
option, and --task=LABEL.task=TASK adds a task once more under another label. --source=NAME:PATH
adds a set of text, of which --max_tokens are scored. --layer=softmax.window=512 changes an option
that has no parameters (for LM-Infinite: global_tokens, distance_ceiling). --text=PATH scores only
that text and prints one line. --mesh=sequence=4 splits rows that one device cannot hold.
"""

import contextlib
import json

from absl import flags
from rich.console import Console

from launch import cli, members, result, sets
from lm.config import UserError

_LAYER, _MESH = members.layer_flag(), members.mesh_flag()
_TASK = flags.DEFINE_multi_string("task", [], "TASK or LABEL.OPTION=VALUE; may be repeated")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_DATA_DIR = cli.data_dir_flag()
_SOURCE = flags.DEFINE_multi_string("source", [], "NAME:PATH, a set of text to add; repeatable")
_TEXT = flags.DEFINE_string("text", "", "a text file or a glob, scored alone")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "tokens a set; 0: the run's", lower_bound=0)
_OUT = flags.DEFINE_string("out", "", "JSON file to write")
result.flag()


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    if _TEXT.value and (_SOURCE.value or _TASK.value):
        raise UserError("--text is scored alone; leave out --source and --task")
    path, layers = cli.path("checkpoint", _CHECKPOINT.value), members.layers(_LAYER.value)
    asked, out = members.tasks(_TASK.value), cli.out_file("out", _OUT.value)
    from lm import evals, files  # after the flags: imports jax
    from lm.data import loader, prepare
    from lm.evals import bits_per_byte
    from lm.evaluation import evaluate
    from lm.evaluation.scoring import Scorer
    from lm.run import checkpoint, compiled
    from lm.run.progress import ScoringBar

    tasks = evals.create(asked, "--task")
    loaded = checkpoint.load(path, layers, members.mesh(_MESH.value))
    config, tokenizer = loaded.config, loaded.tokenizer
    if _TEXT.value:
        data, most = sets.alone(config.data, _TEXT.value), sets.WHOLE
    else:
        data, most = sets.added(config.data, _SOURCE.value), config.evaluate.max_tokens
        tasks = evals.create(config.evaluate.tasks, "evaluate.tasks") | tasks
    data_dir = prepare.resolve_data_dir(_DATA_DIR.value)
    compiled.keep(data_dir, is_wanted=config.run.keep_compiled)
    if bits_per_byte.has_sets(data) or not tasks:
        tasks = evals.create({"bits_per_byte": {}}, "--task") | tasks
    with sets.by_flag() if _TEXT.value else contextlib.nullcontext():
        prepared = prepare.prepare(data, data_dir, tokenizer=tokenizer)
    if not _TEXT.value:
        saved = checkpoint.read_loader(checkpoint.locate(path)).get("identity", {})
        loader.warn_changed(saved, loader.held_out(prepared, config.data))
    max_tokens = _MAX_TOKENS.value or most
    questions = evaluate.prepare(tasks, evals.Given(tokenizer, prepared, data, max_tokens))
    with ScoringBar({k: evaluate.num_tokens(x) for k, x in questions.items()}) as bar:
        results = evaluate.run(questions, Scorer(loaded.build, loaded.params), advance=bar.advance)
    if _TEXT.value:
        print(sets.line(results["bits_per_byte"], _TEXT.value))
    else:
        Console().print(*evaluate.tables(results))
    found = {"step": loaded.step, "layers": layers, "tasks": evaluate.to_mapping(results)}
    result.give({"checkpoint": str(path)} | found)
    if out:
        files.replace(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
