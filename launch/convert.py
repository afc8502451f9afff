"""Converts a checkpoint to another pattern of layers.

    espalier convert --checkpoint=A --pattern=softmax,gated_deltanet --workdir=B
    espalier convert --checkpoint=A --pattern=local,full --workdir=B \\
        --layer=local.mixer=softmax --layer=local.window=128 --layer=full.mixer=softmax

Layer n of B takes every parameter that has the same name and shape in layer n of A; the others are
initialized. Both kinds are listed. A new label takes the options of A's layers with its mixer,
unless --layer sets them; options that change are listed too. A pattern of groups is written as in
an experiment, '((3, "softmax"), (1, "gla"))', and sets the depth of B. B is a run folder like those
of espalier import_hf, with an experiment.py that continues from it.
"""

import dataclasses
from typing import Any

from absl import flags

from launch import cli, members, shell, values
from lm import build as build_lib

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_PATTERN = flags.DEFINE_string("pattern", None, "the new model.pattern", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run folder to create", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the initialized parameters", lower_bound=0)
_LAYER = members.layer_flag()


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    path, workdir = cli.path("checkpoint", _CHECKPOINT.value), cli.path("workdir", _WORKDIR.value)
    pattern, layers = values.read(Any, _PATTERN.value, "--pattern"), members.layers(_LAYER.value)
    from lm.interop import convert, folder, importing, weights
    from lm.run import checkpoint, record  # after the flags are known to be right: imports jax
    from lm.run.progress import WeightsBar

    with folder.created(workdir) as partial:
        config = checkpoint.read_config(checkpoint.locate(path))
        model = convert.model_config(config.model, pattern, layers)
        config = dataclasses.replace(config, model=model, init_from="")
        built = build_lib.local(config)
        with WeightsBar("reading", None):
            loaded = checkpoint.load(path)
        params, report = convert.convert(loaded.params, loaded.build, built, _SEED.value)
        weights.save(partial, config, params)
        importing.write_experiment(partial, workdir)
        record.write(partial, built, loaded.tokenizer, {"converted_from": str(path)}, None)
    print("\n".join(report.lines()))
    print(
        "to continue training: "
        + shell.line("train", [f"--config={workdir}/experiment.py", "--workdir=NEW"])
    )


if __name__ == "__main__":
    cli.run(main)
