"""Does one Power curve replace tuning the learning rate for every budget?

Command: espalier sweep --config=power_transfer:PRESET[,DATA]
             --workdir=DIR --table=experiments/power_transfer/TABLE.jsonl
         PRESET is grid, then (after `espalier fit`) tune, then judge; judge reads its rates and
         its law from the tables beside this file. gpu is the grid for an accelerator, and bigger is
         the run of `espalier forecast`. TABLE is sweep for grid, and headline for tune and judge.
         DATA is a folder with enwiki/ (default: the standard library's sources). README.md has all
         commands.
Cost:    grid: 72 trunks of 4.4 M tokens, 320 M in all: about three hours of two idle CPU cores;
         tune and judge: 430 M tokens, one to two hours. gpu: 72 trunks of 0.56 G tokens, not run.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import base

K = 1024
HERE = Path(__file__).parent
FAMILIES = ("wsd", "cosine")  # tuned at every budget
TUNE_SEEDS, JUDGE_SEEDS = (0, 1), (2, 3, 4, 5)
# Budgets and a batch that are not in the grid to which the law is fitted.
HEADLINE_ROWS = 16
HEADLINE_LENGTHS = tuple(f"{tokens * K} tokens" for tokens in (768, 2560, 8192))


def schedule(family: str, peak: float, **options: Any) -> dict[str, Any]:
    """A schedule with the warmup that all share, and their decay if it has a stable phase."""
    found = {"family": family, "peak_learning_rate": peak, "warmup": f"{64 * K} tokens"}
    if family == "cosine":
        found |= {"horizon": "100 percent"}
    else:
        found |= {"decay": "10 percent", "decay_shape": "exponential"}
    return found | {"final_ratio": 0.0} | options


def run(data: str) -> ConfigDict:
    """A small transformer on bytes of text, decayed over the last tenth of its tokens."""
    config = base.get_config()
    config.model.pattern = "softmax"
    config.model.update(
        {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    )
    # Widths are multiples of 32, the width for which the multipliers are stated.
    config.model.ffn_dim = 88
    config.model.unroll = True
    config.mup.update({"base_width": 32.0, "residual_multiplier": 1.0})
    config.data.tokenizer = {"kind": "bytes", "path": "", "vocab_size": 257}
    if data:  # one file of 20 M bytes, of which no run reads more than a quarter
        config.data.sources = base.enwiki(data)
        config.data.sources.enwiki.path = f"{data}/enwiki/train_00.jsonl.gz"
    config.data.context_length = 128
    config.schedule = schedule("wsd", 0.02)
    config.optimizer.spike_ratio = (
        0.0  # no step is skipped, so a rate that is too high shows in the loss
    )
    config.loss.chunk_size = 4096
    config.evaluate.max_tokens = 128 * K
    config.log.update({"every": "1 percent", "samples": ()})
    config.checkpoint.every = "100 percent"
    return config


def grid() -> tuple[dict[str, Any], ...]:
    """The grid of rates over tokens, batch and width."""
    lengths = tuple(f"{256 * K * 2**i} tokens" for i in range(5))
    return _grids((32, 64), ((32, 2), (12, 3), (4, 4)), lengths)


def _grids(
    widths: tuple[int, ...], batches: tuple[tuple[int, int], ...], lengths: tuple[str, ...]
) -> tuple[dict[str, Any], ...]:
    """`batches`: pairs of rows and i. 2^-i is the largest of six rates, a factor of 2 apart, around
    the optimum, which is higher for larger batches.
    """
    return tuple(
        {
            "seed": (seed,),
            "width": (width,),
            "data.batch_size": (rows,),
            "schedule.peak_learning_rate": tuple(2.0**-i for i in range(first, first + 6)),
            "run.length": lengths,
        }
        for seed in (0, 1)
        for width in widths
        for rows, first in batches
    )


def tune() -> tuple[dict[str, Any], ...]:
    """WSD and cosine at every budget of the headline, with six rates a factor of 2 apart."""
    rates = {"wsd": range(4, 10), "cosine": range(3, 9)}
    return tuple(
        {
            "seed": TUNE_SEEDS,
            "data.batch_size": (HEADLINE_ROWS,),
            "schedule": tuple(schedule(family, 2.0**-i) for i in rates[family]),
            "run.length": HEADLINE_LENGTHS,
        }
        for family in FAMILIES
    )


def judge() -> tuple[dict[str, Any], ...]:
    """Each family at the rate that tuning chose for the budget, and Power as the grid's fit has it,
    one setting for all budgets, on seeds that have chosen nothing (Power on the others too).
    """
    own = {"data.batch_size": (HEADLINE_ROWS,), "run.length": HEADLINE_LENGTHS}
    found = [{"seed": TUNE_SEEDS + JUDGE_SEEDS, "schedule": (power(),)} | own]
    for (family, tokens), rate in sorted(tuned().items()):
        chosen = {"schedule": (schedule(family, rate),), "run.length": (f"{tokens} tokens",)}
        found.append({"seed": JUDGE_SEEDS} | own | chosen)
    return tuple(found)


def tuned() -> dict[tuple[str, int], float]:
    """(family, tokens) -> the rate of the least mean loss over the seeds that tune, of the rates
    that all of them have; `espalier regret` chooses the same.
    """
    losses: dict[tuple[str, int], dict[float, list[float]]] = {}
    for line in (HERE / "headline.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["seed"] in TUNE_SEEDS and row["schedule"] in FAMILIES:
            rates = losses.setdefault((row["schedule"], row["tokens"]), {})
            loss = math.inf if row["loss"] is None else row["loss"]
            rates.setdefault(row["learning_rate"], []).append(loss)
    whole = {
        key: {rate: sum(x) for rate, x in rates.items() if len(x) == len(TUNE_SEEDS)}
        for key, rates in losses.items()
    }
    return {key: min(rates, key=lambda x: rates[x]) for key, rates in whole.items() if rates}


def law(batch: int) -> Callable[[float], float]:
    """tokens -> the best peak rate at `batch` tokens a step, as the grid's fit has it."""
    path = HERE / "fit.json"
    if not path.exists():
        raise ValueError(
            f"{path.name} is not beside this file yet; espalier fit writes it (README.md)"
        )
    fit = json.loads(path.read_text(encoding="utf-8"))
    found = fit["equations"][0]["values"]
    return lambda tokens: found["a"] * (batch / 4096) ** found["c"] * tokens ** found["b"]


def power() -> dict[str, Any]:
    """The fitted law at the batch of the headline, capped at its rate at 0.25 M tokens, where the
    data of the fit begin. It does not depend on the length of a run.
    """
    batch = HEADLINE_ROWS * 128
    rate = law(batch)
    # The schedule is proportional to the batch (c = 1), so its `a` absorbs the fitted c.
    slope = math.log(rate(2.0) / rate(1.0), 2)
    return schedule("power", rate(256 * K), a=rate(1.0) * 4096 / batch, b=slope)


def bigger(data: str) -> ConfigDict:
    """The run of the forecast: four times the width, 8 M tokens, at the rate of the fitted law."""
    config = run(data)
    config.model.update({"width": 128, "num_heads": 8, "num_kv_heads": 8, "ffn_dim": 352})
    config.data.batch_size = 32
    tokens = 8 * K * K
    config.run.length = f"{tokens} tokens"
    config.schedule = schedule("wsd", law(32 * 128)(tokens))
    return config


def gpu(data: str) -> tuple[ConfigDict, tuple[dict[str, Any], ...]]:
    """The grid 128 times longer, at widths and batches of small language models."""
    config = run(data)
    config.model.update({"width": 256, "num_layers": 8, "num_heads": 4, "num_kv_heads": 4})
    config.model.update({"head_dim": 64, "ffn_dim": 704, "unroll": False})
    config.model.precision = "bfloat16"
    config.mup.base_width = 256.0
    if data:
        config.data.sources = base.enwiki(data)
    config.data.context_length = 512
    config.schedule.warmup = f"{8 * K * K} tokens"
    config.evaluate.max_tokens = 4 * K * K
    lengths = tuple(f"{32 * K * K * 2**i} tokens" for i in range(5))
    return config, _grids((256, 512), ((1024, 4), (384, 5), (128, 6)), lengths)


def get_config(arg: str = "grid") -> ConfigDict:
    preset, _, data = arg.partition(",")
    grids = {"grid": grid, "tune": tune, "judge": judge}
    values: dict[str, Any] = {"run": run(data), "min_steps": 100, "halving": 0}
    if preset == "bigger":
        return bigger(data)
    if preset == "gpu":
        values["run"], values["grids"] = gpu(data)
    elif preset in grids:
        values["grids"] = grids[preset]()
    else:
        raise ValueError(f"preset {preset!r} is not grid, tune, judge, bigger or gpu")
    return ConfigDict(values)
