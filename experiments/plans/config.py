"""Do runs of 3 and 8 billion parameters fit machines that are not here, and what bounds them there?

Command: python -m launch.plan --config=experiments/plans/config.py:3b --target=v5e-256 --output=...
         presets 3b, 8b; "3b,DATA" names the folder of the text
Cost:    minutes of a compiler on two CPU cores each; the runs themselves are not made.
Expected: README.md beside this file holds the plans.

3b: the sizes of PowerLM-3B (arXiv 2408.13359, section 4: width 2,304, 40 layers, 36 heads, 9,216)
    with stick-breaking attention and no position encoding, 1,024 rows of 4,096 tokens a step.
8b: three layers of gated DeltaNet to one of softmax attention with eight key-value heads (the
    pattern of arXiv 2412.06464's hybrids, deeper), 512 rows of 8,192 tokens a step.
"""

from ml_collections import ConfigDict

from experiments import base

PRESETS = {
    "3b": {
        "model": {
            "width": 2304,
            "num_layers": 40,
            "num_heads": 36,
            "num_kv_heads": 36,
            "head_dim": 64,
            "ffn_dim": 9216,
            "pattern": "stickbreaking",
        },
        "data": {"context_length": 4096, "batch_size": 1024},
    },
    "8b": {
        "model": {
            "width": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "ffn_dim": 12288,
            "pattern": "gated_deltanet,gated_deltanet,gated_deltanet,softmax",
        },
        "data": {"context_length": 8192, "batch_size": 512},
    },
}


def get_config(arg: str = "3b") -> ConfigDict:
    """`arg`: a preset, or a preset and the folder of Parquet files, "3b,DATA"."""
    name, _, data = arg.partition(",")
    run = base.get_config()
    run.model.update(PRESETS[name]["model"])
    run.model.update({"precision": "bfloat16", "remat": "full"})
    run.data.update(PRESETS[name]["data"])
    run.data.tokenizer.vocab_size = 49152
    path = f"{data or 'data'}/*.parquet"
    run.data.sources = {
        "text": {"path": path, "text_key": "text", "weight": 1.0, "valid_fraction": 0.001}
    }
    run.schedule.update({"warmup": "1 percent", "decay": "20 percent"})
    run.loss.chunk_size = 4096
    run.run.length = "1e12 tokens"
    run.checkpoint.every = "1000 steps"
    run.evaluate.every = "1000 steps"
    run.log.every = "10 steps"
    return run
