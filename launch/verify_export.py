"""Compares a checkpoint with its Hugging Face export.

    export ESPALIER_INTEROP_PYTHON=PYTHON
    espalier verify_export --folder=HF_DIR --checkpoint=WORKDIR

PYTHON is an interpreter with torch and transformers installed (CONTRIBUTING.md). Exit status 1 if a
logit differs by more than --tolerance or is not finite.
"""

import math

from absl import flags
from rich.console import Console
from rich.table import Table

from launch import cli
from lm.config import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_FOLDER = flags.DEFINE_string("folder", None, "the Hugging Face folder", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text in place of the four defaults; repeatable")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of transformers")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "largest difference of logits allowed")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "tokens to add", lower_bound=1)


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    path, folder = cli.path("checkpoint", _CHECKPOINT.value), cli.path("folder", _FOLDER.value)
    if not (math.isfinite(_TOLERANCE.value) and _TOLERANCE.value >= 0):
        raise UserError(f"--tolerance={_TOLERANCE.value} is not a finite number >= 0; set 1e-3")
    from lm.interop import verify
    from lm.run import checkpoint  # after the flags are known to be right: imports jax

    prompts = _PROMPT.value or verify.PROMPTS
    verify.interpreter()
    config = checkpoint.read_config(checkpoint.locate(path))
    verify.check(folder, config.data.tokenizer.vocab_size, prompts)
    found = verify.compare(
        checkpoint.load(path),
        folder,
        prompts=prompts,
        dtype=_DTYPE.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
    )
    table = Table(title=f"ours and {found.theirs}, {found.positions} positions", show_header=False)
    table.add_row("largest difference of logits", f"{found.max_difference:.2e}")
    table.add_row("root mean square of logits", f"{found.scale:.3g}")
    table.add_row("KL(ours || theirs), mean", f"{found.kl:.2e} nats")
    table.add_row("same likeliest token", f"{found.agreement:.2%} of positions")
    table.add_row("greedy tokens alike", f"{found.same_tokens} of {found.new_tokens}")
    table.add_row("tokenizers agree on the prompts", "yes" if found.same_ids else "no")
    Console().print(table)
    for prompt, ours, theirs in found.texts:
        if ours != theirs:
            print(f"{prompt!r}:\n  ours   {ours!r}\n  theirs {theirs!r}")
    return int(not found.is_within(_TOLERANCE.value))


if __name__ == "__main__":
    cli.run(main)
