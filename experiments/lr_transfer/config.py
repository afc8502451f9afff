"""Does the best learning rate stay the same when a model gets wider?

Command: espalier lr_transfer --config=lr_transfer:PRESET[,DATA]
             --workdir=DIR --table=experiments/lr_transfer/sweep.jsonl
         PRESET is cpu, gpu or smoke; DATA is a folder with enwiki/ (default: the standard library).
Cost:    cpu: 480 trainings of 100 steps of 1,024 tokens, about two hours of two idle CPU cores.
Expected: under muP the optimum moves by at most one bin (a factor of 2), without it by two or more.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base

MIXERS = ("softmax", "stickbreaking", "deltanet", "gla", "mamba2")


def run(data: str) -> ConfigDict:
    """Two layers on bytes of text, with a learning rate that falls to zero."""
    config = base.get_config()
    config.model.pattern = "softmax"
    config.model.update(
        {"width": 16, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    )
    config.model.ffn_dim = 40
    config.mup.update({"base_width": 16.0, "init_std": 0.1, "residual_multiplier": 1.0})
    config.mup.embedding_multiplier = 1.0
    config.data.tokenizer = {"kind": "bytes", "path": "", "vocab_size": 257}
    if data:
        config.data.sources = base.enwiki(data)
        config.data.sources.enwiki.path = f"{data}/enwiki/train_00.jsonl.gz"
    config.data.update({"context_length": 64, "batch_size": 16})
    config.schedule = {
        "family": "linear",
        "peak_learning_rate": 0.02,
        "warmup": "10 steps",
        "horizon": "100 percent",
        "final_ratio": 0.0,
    }
    config.optimizer.spike_ratio = 0.0
    config.run.length = "100 steps"
    config.loss.chunk_size = 1024
    config.evaluate.max_tokens = 64 * 1024
    config.log.update({"every": "5 steps", "samples": ()})
    config.checkpoint.every = "100 percent"
    return config


def get_config(arg: str = "cpu") -> ConfigDict:
    preset, _, data = arg.partition(",")
    rates = lambda first, last: tuple(2.0**i for i in range(first, last + 1))
    study: dict[str, Any] = {
        "run": run(data),
        "patterns": MIXERS,
        "widths": (16, 48, 128),
        "learning_rates": {"mup": rates(-9, -2), "standard": rates(-11, -4)},
        "seeds": (0, 1),
    }
    if preset == "gpu":
        study["run"].run.length = "1000 steps"
        study["run"].data.update({"context_length": 512, "batch_size": 32})
        study |= {"widths": (128, 384, 1024), "seeds": (0, 1, 2)}
    elif preset == "smoke":
        study["run"].run.length = "20 steps"
        few = {"mup": rates(-6, -4), "standard": rates(-7, -5)}
        study |= {"patterns": ("softmax",), "widths": (16, 32), "learning_rates": few}
        study["seeds"] = (0,)
    elif preset != "cpu":
        raise ValueError(f"preset {preset!r} is not cpu, gpu or smoke")
    return ConfigDict(study)
