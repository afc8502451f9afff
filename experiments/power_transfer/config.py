"""Does one Power curve replace the tuning of a learning rate for every budget?

Command: python -m launch.sweep --config=experiments/power_transfer/config.py:PRESET[,DATA]
             --workdir=DIR --table=experiments/power_transfer/sweep.jsonl
         PRESET is grid; DATA a folder with enwiki/ (else: the standard library's sources).
Cost:    grid: 72 trunks of 4.4 M tokens, 320 M in all: about three hours of two idle CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import base

K = 1024


def run(data: str) -> ConfigDict:
    """A small transformer on bytes of text, decayed over the last tenth of its tokens."""
    config = base.get_config()
    config.model.pattern = "softmax"
    config.model.update(
        {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    )
    # Widths are multiples of 32; multipliers are stated for it.
    config.model.ffn_dim = 88
    config.model.unroll = True
    config.mup.update({"base_width": 32.0, "residual_multiplier": 1.0})
    config.data.tokenizer = {"kind": "bytes", "path": "", "vocab_size": 257}
    if data:  # a file has 20 M bytes, of which no run sees more than a quarter
        config.data.sources = base.enwiki(data)
        config.data.sources.enwiki.path = f"{data}/enwiki/train_00.jsonl.gz"
    config.data.context_length = 128
    config.schedule = {
        "family": "wsd",
        "peak_learning_rate": 0.02,
        "warmup": f"{64 * K} tokens",
        "decay": "10 percent",
        "decay_shape": "exponential",
        "final_ratio": 0.0,
    }
    config.optimizer.spike_ratio = 0.0  # a rate that is too high shows in the loss
    config.loss.chunk_size = 4096
    config.evaluate.max_tokens = 128 * K
    config.log.update({"every": "1 percent", "samples": ()})
    config.checkpoint.every = "100 percent"
    return config


def grids() -> tuple[dict[str, Any], ...]:
    """Best rates against tokens, batch and width: rates a factor 2 apart, around the optimum, which
    is higher for larger batches.
    """
    lengths = tuple(f"{256 * K * 2**i} tokens" for i in range(5))
    return tuple(
        {
            "seed": (seed,),
            "width": (width,),
            "data.batch_size": (rows,),
            "schedule.peak_learning_rate": tuple(2.0**-i for i in range(first, first + 6)),
            "run.length": lengths,
        }
        for seed in (0, 1)
        for width in (32, 64)
        for rows, first in ((32, 2), (12, 3), (4, 4))
    )


def get_config(arg: str = "grid") -> ConfigDict:
    preset, _, data = arg.partition(",")
    if preset != "grid":
        raise ValueError(f"preset {preset!r} is not grid")
    values = {"run": run(data), "grids": grids(), "min_steps": 100, "halving": 0}
    return ConfigDict(values)
