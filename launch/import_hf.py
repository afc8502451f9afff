"""Imports a Hugging Face model as a run folder.

    espalier import_hf --folder=HF_DIR --workdir=DIR [--config.model.precision=bfloat16]

HF_DIR holds config.json (of LlamaForCausalLM, GraniteForCausalLM, or from espalier export_hf),
tokenizer.json and safetensors. The run folder gets one checkpoint, of step 0 and without optimizer
state. lm.load and espalier generate, evaluate and convert take it; to continue training from it,
use --config=DIR/experiment.py with a new workdir.

--config sets everything that HF_DIR does not (data, schedule, precision, ...); its default is
experiments/base.py.
"""

import sys

from absl import flags

from launch import cli, presets, shell

_CONFIG = cli.config_flag()
_FOLDER = flags.DEFINE_string("folder", None, "the Hugging Face folder to read", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run folder to create", required=True)


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    source, workdir = cli.path("folder", _FOLDER.value), cli.path("workdir", _WORKDIR.value)
    cli.load_config(_CONFIG.value)  # report mistakes in it before reading HF_DIR
    from lm import params  # after the flags are known to be right: imports jax
    from lm.interop import folder, importing
    from lm.run import record

    with folder.created(workdir) as partial:
        base = _CONFIG.value.to_dict()
        found = importing.run(source, base, workdir=workdir, partial=partial)
        record.write(partial, found.build, found.tokenizer, found.source, None)
    for note in found.notes:
        print(f"note: {note}")
    count = params.count(found.build.infos)["total"]
    print(
        f"{workdir}: {count:,} parameters of {found.source['imported_from']}, stored as "
        f"{found.source['stored_as']}"
    )
    print(
        "to continue training: "
        + shell.line("train", [f"--config={workdir}/experiment.py", "--workdir=NEW"])
    )


if __name__ == "__main__":
    sys.argv.insert(1, f"--config={presets.BASE}")  # the last --config wins
    cli.run(main)
