"""How much of a learning rate that is three times off does a hypergradient make good?

Command: python -m launch.sweep --config=experiments/hypergradient/config.py --workdir=DIR
             --table=experiments/hypergradient/sweep.jsonl
Cost:    12 runs of 400 steps, 7 M tokens in all, on the standard library's sources: about six
         minutes of a core.
"""

from ml_collections import ConfigDict

from experiments import base

PEAK = 2.0**-6  # near the best for this model and batch
K = 1024


def run() -> ConfigDict:
    """A small transformer on bytes of Python, 400 steps, decayed over the last tenth of them."""
    config = base.get_config()
    config.model.pattern = "softmax"
    config.model.update(
        {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    )
    config.model.ffn_dim = 88
    config.model.unroll = True
    config.mup.update({"base_width": 32.0, "residual_multiplier": 1.0})
    config.data.tokenizer = {"kind": "bytes", "path": "", "vocab_size": 257}
    config.data.update({"context_length": 128, "batch_size": 12})
    config.schedule = {
        "family": "wsd",
        "peak_learning_rate": PEAK,
        "warmup": f"{64 * K} tokens",
        "decay": "10 percent",
        "decay_shape": "exponential",
        "final_ratio": 0.0,
    }
    config.optimizer.spike_ratio = 0.0  # a rate that is too high shows in the loss
    config.run.length = "400 steps"
    config.loss.chunk_size = 4096
    config.evaluate.max_tokens = 128 * K
    config.log.update({"every": "1 steps", "samples": ()})
    config.checkpoint.every = "100 percent"
    return config


def get_config() -> ConfigDict:
    grid = {
        "seed": (0, 1),
        "schedule.peak_learning_rate": (PEAK / 3, PEAK, 3 * PEAK),
        "optimizer.hypergradient": (0.0, 0.1),
    }
    return ConfigDict({"run": run(), "grids": (grid,), "min_steps": 0, "halving": 0})
