"""Every key of a run, once. An experiment takes this and changes what its question is about."""

from typing import Any

from ml_collections import ConfigDict, FieldReference

MODEL = {
    "width": 256,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
    "ffn_dim": 704,
    # label -> {"mixer": name, **options}, the options being the fields of lm/mixers/<name>.py:
    # {"local": {"mixer": "softmax", "window": 128, "qk_norm": True}}. A layer that differs from the
    # model in "mlp", "residual" or "matrix" says so: {"mixer": "gla", "mlp": "none"}
    "layers": {},
    "mlp": {"family": "swiglu"},  # a file of lm/feed_forward and its options, for every layer
    "residual": {"family": "pre_norm"},  # a file of lm/blocks
    "matrix": {"family": "dense"},  # a file of lm/matrices
    "tied_embeddings": True,
    "norm_eps": 1e-5,
    "precision": "float32",  # float32 | bfloat16 | bfloat16_operands
    "remat": "none",  # none | full | dots | named
    # for remat "named": {"mixer": "device", "mlp_up": "host"}, names of lm/modules/remat.py
    "kept": {},
    "unroll": False,
}

# Granite's multipliers (arXiv 2408.13359, table 4); the width they are stated for is 256.
MUP = {
    "parametrization": "mup",  # mup | standard | completep
    "base_width": 256.0,
    "init_std": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "base_depth": 0,  # of completep: the layers that these are stated for, and
    "alpha": 1.0,  # from 0.5 to 1, how fast its branches shrink with the depth
}

DATA = {
    "tokenizer": {"kind": "bpe", "path": "", "vocab_size": 4096},
    "sources": {
        "stdlib": {"path": "stdlib", "text_key": "text", "weight": 1.0, "valid_fraction": 0.05},
    },
    "context_length": 512,
    "batch_size": 8,
    # Rows of the first batches, which double until batch_size (0: none); in tokens or steps; while
    # they grow the learning rate is multiplied by (rows / batch_size)^rate_exponent.
    "batch_warmup": {"first": 0, "length": "0 tokens", "rate_exponent": 0.0},
    "packing": "concat",  # concat | best_fit
}

# Durations are "N steps", "N tokens" or "N percent" of the run.
SCHEDULE = {
    "family": "power",  # a file of lm/schedules; naming another takes its options and defaults
    "peak_learning_rate": 0.02,
    "a": 4.0,
    "b": -0.51,
    "warmup": "100000 tokens",
    "decay": "20 percent",
    "decay_shape": "exponential",  # exponential | linear | sqrt | cosine | geometric | half_life
    "final_ratio": 0.0,
}

OPTIMIZER = {
    "family": "adamw",  # a file of lm/optimizers
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-10,
    "weight_decay": 0.1,
    "weight_decay_mode": "coupled",  # coupled | independent | width_invariant
    "clip_norm": 1.0,
    "spike_ratio": 20.0,  # a gradient norm this many times its mean is skipped; 0: no limit
    "max_skipped": 10,  # skipped steps in a row that stop the run
    "memory": "device",  # of the moments between steps: device | host
}

# Devices along each axis; one may be -1, which takes the rest.
MESH = {
    "data": -1,  # copies of the model
    "fsdp": 1,  # parts of parameters and optimizer state, gathered layer by layer (ZeRO-3)
    "tensor": 1,  # parts of heads, feed-forward and vocabulary
    "sequence": 1,  # parts of T, of rows that no single device can hold
    "replicate": (),  # letters that need not divide: ("G",) repeats key-value heads
    "zero1": False,  # optimizer state in parts over the data axis
    "stream_over_tensor": False,  # the residual stream in parts of T over the tensor axis
    "sequence_strategy": "auto",  # how ops share T: a name, or "label=name,label=name"
    "sequence_layout": "contiguous",  # or "zigzag", which balances the work of attention
}


def get_config() -> ConfigDict:
    """A small run on the standard library; change anything."""
    values: dict[str, Any] = {
        "seed": 0,
        "init_from": "",  # a checkpoint of which only the weights are taken
        "decay_from": "",  # a trunk checkpoint from which only the decay is run
        # Labels or mixer names: "a", "a,b" cycled over the depth, or groups like
        # ((5, "a"), (1, "a,b")); a reference, since a string and a tuple must both fit.
        "model": {**MODEL, "pattern": FieldReference("stickbreaking", field_type=object)},
        "mup": MUP,
        "data": DATA,
        "schedule": SCHEDULE,
        "optimizer": OPTIMIZER,
        "objective": {"family": "next_token"},  # a file of lm/objectives
        "loss": {"z_loss": 0.0, "chunk_size": 1024},
        "mesh": MESH,
        "run": {"length": "1000000 tokens", "accumulation": 1},
        # tasks: label -> {"task": name, **options}, fields of lm/evals/<name>.py
        # share: of the FLOPs of training, what `every` in percent may spend; the last evaluation of
        # a run comes in any case (0: no limit)
        "evaluate": {"every": "25 percent", "share": 0.2, "max_tokens": 32768, "tasks": {}},
        "log": {
            "every": "1 steps",
            "samples": ("def ",),
            "sample_tokens": 64,
            "gradient_noise": False,  # noise scale and norm test; needs two parts of a batch
            "tracker": {"family": "tensorboard"},  # a file of lm/trackers; off: none
        },
        "checkpoint": {"every": "25 percent", "keep_last": 3, "keep_every": "0 steps"},
    }
    return ConfigDict(values)


def source(path: str, *, weight: float, valid_fraction: float) -> dict[str, object]:
    """Files of JSON lines, documents under "text"; `weight` in the mix of training."""
    return {"path": path, "text_key": "text", "weight": weight, "valid_fraction": valid_fraction}


def enwiki(data: str) -> dict[str, dict[str, object]]:
    """Trained on enwiki/train_*.jsonl.gz of a folder, validated on its valid.jsonl.gz."""
    return {
        "enwiki": source(f"{data}/enwiki/train_*.jsonl.gz", weight=1.0, valid_fraction=0.0),
        "heldout": source(f"{data}/enwiki/valid.jsonl.gz", weight=0.0, valid_fraction=1.0),
    }
