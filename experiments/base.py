"""Every key of a run. An experiment starts from this and changes what its question needs."""

from typing import Any

from ml_collections import ConfigDict, FieldReference

MODEL = {
    "width": 256,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
    "ffn_dim": 704,
    # label -> {"mixer": name, **options}; options are the fields of lm/mixers/<name>.py:
    # {"local": {"mixer": "softmax", "window": 128, "qk_norm": True}}. A layer may set its "mlp",
    # "residual" or "matrix": {"mixer": "gla", "mlp": "none"}
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
    "cpu_unroll": 8,
}

# Granite's multipliers (arXiv 2408.13359, table 4); the width they are stated for is 256.
MUP = {
    "parametrization": "mup",  # mup | standard | completep
    "base_width": 256.0,
    "init_std": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "base_depth": 0,  # completep: the number of layers for which the multipliers are stated
    "alpha": 1.0,  # completep: 0.5 to 1, how fast branches shrink with the depth
}

DATA = {
    "tokenizer": {"kind": "bpe", "path": "", "vocab_size": 4096},
    "sources": {
        "stdlib": {"path": "stdlib", "text_key": "text", "weight": 1.0, "valid_fraction": 0.05},
    },
    "context_length": 512,
    "batch_size": 8,
    # The first batches have `first` rows, which double until batch_size over `length` (tokens or
    # steps; first 0: no warmup). Meanwhile the rate is times (rows / batch_size)^rate_exponent.
    "batch_warmup": {"first": 0, "length": "0 tokens", "rate_exponent": 0.0},
    "packing": "concat",  # concat | best_fit
}

# Durations are "N steps", "N tokens" or "N percent" of the run.
SCHEDULE = {
    "family": "power",  # a file of lm/schedules; another has its own options and defaults
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
    "spike_ratio": 20.0,  # skips steps with a gradient norm this many times its mean; 0: none
    "max_skipped": 10,  # this many skipped steps in a row stop the run
    "memory": "device",  # where moments are between steps: device | host
}

# Devices along each axis; one may be -1, which takes the remaining devices.
MESH = {
    "data": -1,  # copies of the model
    "fsdp": 1,  # parts of parameters and optimizer state, gathered layer by layer (ZeRO-3)
    "tensor": 1,  # parts of heads, feed-forward and vocabulary
    "sequence": 1,  # parts of T, for rows that no single device can hold
    "replicate": (),  # letters whose sizes need not divide: ("G",) repeats key-value heads
    "zero1": False,  # optimizer state in parts over the data axis
    "stream_over_tensor": False,  # the residual stream in parts of T over the tensor axis
    "sequence_strategy": "auto",  # how ops share T: a name, or "label=name,label=name"
    "sequence_layout": "contiguous",  # or "zigzag", which balances the work of attention
}


def get_config() -> ConfigDict:
    """A small run on the standard library's sources; change anything."""
    values: dict[str, Any] = {
        "seed": 0,
        "init_from": "",  # a checkpoint whose weights are taken, and nothing else
        "decay_from": "",  # a checkpoint of a trunk, from which only the decay is run
        # Labels or mixer names: "a"; "a,b", cycled over the depth; or groups like
        # ((5, "a"), (1, "a,b")). A FieldReference, since it may hold a string or a tuple.
        "model": {**MODEL, "pattern": FieldReference("stickbreaking", field_type=object)},
        "mup": MUP,
        "data": DATA,
        "schedule": SCHEDULE,
        "optimizer": OPTIMIZER,
        "objective": {"family": "next_token"},  # a file of lm/objectives
        "loss": {"z_loss": 0.0, "chunk_size": 1024},
        "mesh": MESH,
        "run": {"length": "1000000 tokens", "accumulation": 1, "keep_compiled": True},
        # tasks: label -> {"task": name, **options}, fields of lm/evals/<name>.py
        # share: the most FLOPs that `every` in percent may spend, over those of training (0: no
        # limit); the last evaluation of a run is always done
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
    """A source of JSON lines with documents under "text"; `weight` is its weight in training."""
    return {"path": path, "text_key": "text", "weight": weight, "valid_fraction": valid_fraction}


def enwiki(data: str) -> dict[str, dict[str, object]]:
    """Sources that train on enwiki/train_*.jsonl.gz of a folder; valid.jsonl.gz is held out."""
    return {
        "enwiki": source(f"{data}/enwiki/train_*.jsonl.gz", weight=1.0, valid_fraction=0.0),
        "heldout": source(f"{data}/enwiki/valid.jsonl.gz", weight=0.0, valid_fraction=1.0),
    }
