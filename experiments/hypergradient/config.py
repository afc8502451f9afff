"""How far does a hypergradient correct a learning rate that is off by a factor of three?

Command: espalier sweep --config=hypergradient --workdir=DIR
             --table=experiments/hypergradient/sweep.jsonl
Cost:    12 runs of 400 steps, 7 M tokens in all, on the standard library's sources: about six
         minutes of a core.
"""

from ml_collections import ConfigDict

from experiments.power_transfer import config as power_transfer

PEAK = 2.0**-6  # near the best for this model and batch


def run() -> ConfigDict:
    """The model of power_transfer on bytes of Python for 400 steps, all of them logged."""
    config = power_transfer.run("")
    config.data.batch_size = 12
    config.schedule.peak_learning_rate = PEAK
    config.run.length = "400 steps"
    config.log.every = "1 steps"
    return config


def get_config() -> ConfigDict:
    grid = {
        "seed": (0, 1),
        "schedule.peak_learning_rate": (PEAK / 3, PEAK, 3 * PEAK),
        "optimizer.hypergradient": (0.0, 0.1),
    }
    return ConfigDict({"run": run(), "grids": (grid,), "min_steps": 0, "halving": 0})
