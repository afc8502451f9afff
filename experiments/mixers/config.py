"""Which mixer learns most from the same text, at the same size? Every mixer, 300 steps.

Command: espalier compare --config=mixers --workdir=DIR
Cost:    14 mixers x 2 seeds x 0.3 million tokens, 0.5 M parameters; half an hour on two CPU cores;
         the same command resumes it.
Expected: README.md beside this file holds the table of a measured run.
"""

from ml_collections import ConfigDict

from experiments import base

MIXERS = (
    "softmax",
    "stickbreaking",
    "linear",
    "retnet",
    "gla",
    "based",
    "hedgehog",
    "transnormer",
    "lightnet",
    "deltanet",
    "gated_deltanet",
    "mamba2",
    "s4d",
    "h3",
)


def get_config() -> ConfigDict:
    """`run` is an ordinary configuration; all patterns get the parameter count of the first."""
    run = base.get_config()
    run.model.update(
        {"width": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    )
    run.model.ffn_dim = 384
    # 1.4 / sqrt(num_layers), MiniCPM's rule (arXiv 2404.06395).
    run.mup.residual_multiplier = 0.8
    run.data.update({"context_length": 256, "batch_size": 4})
    run.schedule.warmup = "30000 tokens"
    run.run.length = "300 steps"
    run.evaluate.update({"every": "100 percent", "max_tokens": 131072})
    run.log.samples = ()
    run.checkpoint.every = "100 percent"
    return ConfigDict(
        {
            "question": "Which mixer learns most from the same text, at the same size?",
            "run": run,
            "patterns": MIXERS,
            "variants": {},
            "primary": (),  # two seeds are too few for a verdict
            "seeds": (0, 1),
            "tuned_on": (),
            "tasks": {},
            "recall": {},
            "timing_rounds": 7,
            "decode_contexts": (),
        }
    )
