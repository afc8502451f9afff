"""Writes a checkpoint as a Hugging Face folder.

    espalier export_hf --checkpoint=WORKDIR --folder=OUT [--dtype=bfloat16]

Patterns of softmax layers become Llama or Granite, which transformers loads. If transformers lacks
a class for a model, the folder has our own format (lm/interop/README.md), which espalier import_hf
reads, and the reason is printed.
"""

from absl import flags

from launch import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP", required=True
)
_FOLDER = flags.DEFINE_string("folder", None, "the folder to create", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of stored weights")
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "4GB", "largest file, as 500MB or 4GB")
_LONGEST = flags.DEFINE_integer(
    "max_position_embeddings",
    0,
    "max_position_embeddings; 0: that of the imported model, else the run's context length",
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    path, out = cli.path("checkpoint", _CHECKPOINT.value), cli.path("folder", _FOLDER.value)
    from lm import build as build_lib  # after the flags are known to be right: imports jax
    from lm.interop import exporting, folder
    from lm.run import checkpoint

    found = checkpoint.locate(path)
    built = build_lib.local(checkpoint.read_config(found))
    with folder.created(out) as partial:
        done = exporting.run(
            found,
            partial,
            built=built,
            dtype=_DTYPE.value,
            max_shard_size=_MAX_SHARD_SIZE.value,
            longest=_LONGEST.value,
        )
    print(f"{out}: {done.architecture}, {done.size / 1e9:.3g} GB of {_DTYPE.value} weights")
    if done.obstacle is not None:
        print(f"transformers cannot load it, espalier import_hf can: {done.obstacle}")


if __name__ == "__main__":
    cli.run(main)
