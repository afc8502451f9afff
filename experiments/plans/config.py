"""Do runs of 1 to 8 billion parameters fit on absent machines, with rows of up to a million tokens,
and what limits their speed?

Command: espalier plan --config=plans:3b --target=v5e-256 --output=...
         presets 3b, 8b, 1b_long, 3b_long, 8b_long; "3b,DATA" names the folder of the text
Cost:    each plan takes a compiler minutes on two CPU cores; nothing is trained.
Expected: README.md beside this file holds the plans.

3b: the sizes of PowerLM-3B (arXiv 2408.13359, section 4: width 2,304, 40 layers, 36 heads, 9,216)
    with stick-breaking attention and no position encoding, 1,024 rows of 4,096 tokens a step.
8b: three layers of gated DeltaNet to one of softmax attention with eight key-value heads (the
    pattern of arXiv 2412.06464's hybrids, deeper), 512 rows of 8,192 tokens a step.
3b_long, 8b_long: the same models on 16 and 32 rows of 131,072 tokens a step.
1b_long: gated linear attention with the larger size of arXiv 2312.06635 (section 5.1: width 2,048,
    24 layers, 4 heads), 4 rows of 1,048,576 tokens a step.
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
PRESETS["3b_long"] = PRESETS["3b"] | {"data": {"context_length": 131072, "batch_size": 16}}
PRESETS["8b_long"] = PRESETS["8b"] | {"data": {"context_length": 131072, "batch_size": 32}}
PRESETS["1b_long"] = {
    "model": {
        "width": 2048,
        "num_layers": 24,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 512,
        "ffn_dim": 5632,
        "pattern": "gla",
    },
    "data": {"context_length": 1048576, "batch_size": 4},
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
