"""Compares a checkpoint with what transformers makes of a Hugging Face folder.

    export ESPALIER_INTEROP_PYTHON=PYTHON
    python -m launch.verify_export --folder=HF_DIR --checkpoint=WORKDIR

PYTHON is an interpreter that has torch and transformers (CONTRIBUTING.md). Exit status 1 where a
logit differs by more than --tolerance.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from launch import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_FOLDER = flags.DEFINE_string("folder", None, "the Hugging Face folder", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue, in place of four; repeatable")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "transformers computes in")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "of the largest difference of logits")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "of each prompt", lower_bound=1)


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    path, folder = cli.path("checkpoint", _CHECKPOINT.value), cli.path("folder", _FOLDER.value)
    from lm import checkpoint  # after the flags are known to be right: imports jax
    from lm.interop import verify

    verify.interpreter()
    found = verify.compare(
        checkpoint.load(path),
        folder,
        prompts=_PROMPT.value or verify.PROMPTS,
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
    return int(found.max_difference > _TOLERANCE.value)


if __name__ == "__main__":
    cli.run(main)
