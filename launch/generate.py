"""Continues prompts with a trained model.

    espalier generate --checkpoint=WORKDIR --prompt="def " [--prompt=...]
    espalier generate --checkpoint=WORKDIR/checkpoints/STEP --prompt_file=FILE

`--prompt_file=-` reads standard input. A prompt is used as it is, including a final newline. The
prompt is printed with its continuation. `--layer` works as in espalier evaluate.
"""

import sys
from pathlib import Path

from absl import flags

from launch import cli, members
from lm.config import UserError

_LAYER, _MESH = members.layer_flag(), members.mesh_flag()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be repeated")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", "", "file with one prompt; - is standard input")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "most tokens to add")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "draw from the likeliest tokens of this total mass; 1: all"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the draws")
_DATA_DIR = cli.data_dir_flag()


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    prompts, path = _prompts(), cli.path("checkpoint", _CHECKPOINT.value)
    layers, mesh = members.layers(_LAYER.value), members.mesh(_MESH.value)
    from lm.data import prepare  # after the flags are known to be right: imports jax
    from lm.evaluation import generate
    from lm.run import checkpoint, compiled

    options = generate.GenerateOptions(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    loaded = checkpoint.load(path, layers, mesh)
    is_wanted = loaded.config.run.keep_compiled
    compiled.keep(prepare.resolve_data_dir(_DATA_DIR.value), is_wanted=is_wanted)
    for i, (prompt, text) in enumerate(
        zip(prompts, generate.complete(loaded, prompts, options), strict=True)
    ):
        if len(prompts) > 1:
            print(f"--- prompt {i} ---")
        print(prompt + text)


def _prompts() -> list[str]:
    if bool(_PROMPT.value) == bool(_PROMPT_FILE.value):
        given = "both" if _PROMPT.value else "neither"
        raise UserError(f"set one of --prompt and --prompt_file; {given} is set")
    if _PROMPT.value:
        return _PROMPT.value
    try:
        path = _PROMPT_FILE.value
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return [data.decode()]
    except OSError as error:
        raise UserError(f"--prompt_file={_PROMPT_FILE.value}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise UserError(f"--prompt_file={_PROMPT_FILE.value}: not UTF-8 at {place}") from None


if __name__ == "__main__":
    cli.run(main)
