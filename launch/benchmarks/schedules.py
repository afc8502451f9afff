"""The share of a step that a schedule and its logging take.

That is the time to compute the rates in a program of their own and to write their records to
metrics.jsonl and TensorBoard, over the time of a step. It is an upper bound: inside a step the
rates are a few numbers in the step's own program, and their records are written together with the
other metrics.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm import metrics, optimizers
from lm.build import Build
from lm.families import SCHEDULES
from lm.schedules import Run
from lm.trackers.tensorboard import Tensorboard

SHARE = Goal("<=", 0.005)
MIXER = "softmax"  # the mixer with the shorter step


def run(options: Options) -> Iterator[Result]:
    built = problem.built(options, MIXER)
    batch, token_bytes = problem.batch(options.sizes), problem.token_bytes(options.sizes)
    given = built.put(batch), built.put_replicated(token_bytes), built.numbers
    step = timing.thread(problem.compiled_step(options, built), built.init(0), *given)
    train = timing.interleave({"train": step}, options.pairs)["train"]
    yield from (_share(options, built, name, train) for name in SCHEDULES.names())


def _share(options: Options, built: Build, name: str, train: list[float]) -> Result:
    config = built.config
    rule = SCHEDULES.create(name, "schedule")
    curve = rule.schedule(Run(10**9, config.tokens_per_step)).curve
    multipliers = built.model.context.multipliers

    def rates(curve: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        return optimizers.learning_rates(curve(tokens), multipliers, built.infos)

    tokens = jax.device_put(np.float32(5e8))
    record = {f"lr/{role}": 0.02 for role in jax.eval_shape(rates, curve, tokens)}
    with (
        tempfile.TemporaryDirectory() as folder,
        metrics.Writer(
            Path(folder), track=lambda step: Tensorboard().open(Path(folder), {}, step)
        ) as writer,
    ):
        sides = {
            "rate": timing.call(rates, jax.device_put(curve), tokens),
            "log": lambda: writer.write({"step": 1, "tokens": 1, **record}),
        }
        samples = timing.interleave(sides, options.pairs) | {"train": train}
    share = lambda of: (of(samples["rate"]) + of(samples["log"])) / of(train)
    return Result(
        name=f"schedules/{name}",
        value=share(timing.quartile),
        by_medians=share(lambda x: float(np.median(x))),
        goal=SHARE,
        samples=samples,
        facts={"mixer": MIXER, "tokens_per_step": config.tokens_per_step},
    )
