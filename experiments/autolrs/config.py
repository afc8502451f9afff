"""Does AutoLRS find the learning rate if the middle of its interval is off by a factor of ten?

Command: espalier autolrs --config=autolrs:CENTRE --workdir=DIR
             CENTRE is low or high: the middle of the interval lies ten times below or above the
             tuned rate. The interval spans a factor of 100, so the tuned rate is one of its ends.
         espalier sweep --config=autolrs:tuned --workdir=DIR
             tunes the rate over a grid, with the same warmup, decay and tokens.
Cost:    a search costs more than six trainings of the quickstart's length, the grid six.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import quickstart

TUNED = 2.0**-8  # best of the grid `tuned`, known before the searches


def run() -> ConfigDict:
    """The model and tokens of quickstart, constants of base.py, a constant rate until the decay."""
    config = quickstart.get_config()
    config.mup.update({"base_width": 256.0, "init_std": 0.1, "embedding_multiplier": 12.0})
    config.schedule = {
        "family": "wsd",
        "peak_learning_rate": TUNED,
        "warmup": "50000 tokens",
        "decay": "20 percent",
        "decay_shape": "exponential",
        "final_ratio": 0.0,
    }
    config.log.samples = ()
    return config


def get_config(arg: str = "high") -> ConfigDict:
    if arg == "tuned":
        rates = tuple(2.0**-i for i in range(4, 10))
        grid: dict[str, Any] = {"schedule.peak_learning_rate": rates}
        values = {"run": run(), "grids": (grid,), "min_steps": 0, "halving": 0}
    elif arg in ("low", "high"):
        lowest = TUNED / 100 if arg == "low" else TUNED
        stages = {"first_stage": 30, "longest_stage": 50, "probes": 6, "validation": 16384}
        stages["anneal"] = 40
        values = {"run": run(), "lowest": lowest, "highest": lowest * 100} | stages
    else:
        raise ValueError(f"{arg!r} is not tuned, low or high")
    return ConfigDict(values)
