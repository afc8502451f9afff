"""Model FLOPs per second of the train step, as a fraction of the machine's float32 matmul rate.

That rate is the best among square products and the products of one layer (one forward and two
backward for each weight). They are timed in turn with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options, Sizes
from launch.benchmarks.timing import Goal, Result
from lm.build import flops_per_token

GOAL = Goal(">=", 0.5)


def run(options: Options) -> list[Result]:
    return [_fraction(options, mixer) for mixer in problem.MIXERS]


def _fraction(options: Options, mixer: str) -> Result:
    sizes, built = options.sizes, problem.built(options, mixer)
    batch = built.put(problem.batch(sizes))
    token_bytes = built.put_replicated(problem.token_bytes(sizes))
    compiled, given = problem.compiled_step(options, built), (batch, token_bytes, built.numbers)
    step = timing.thread(compiled, built.init(0), *given)
    flops = {"step": flops_per_token(built) * sizes.batch_size * sizes.context_length}
    sides = {"step": step}
    for size in sizes.squares:
        name = f"matmul {size}"
        sides[name], flops[name] = _products([(size, size, size)])
    sides["matmuls of a layer"], flops["matmuls of a layer"] = _products(_shapes(sizes))
    samples = timing.interleave(sides, options.pairs)
    by_quartiles = _rates(flops, samples, timing.quartile)
    by_medians = _rates(flops, samples, lambda x: float(np.median(x)))
    return Result(
        name=f"matmul_fraction/{mixer}",
        value=_of_best(by_quartiles),
        by_medians=_of_best(by_medians),
        goal=GOAL,
        samples=samples,
        facts={"flops": flops, "flops_per_second": by_quartiles},
    )


def _shapes(sizes: Sizes) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of a layer's products, forward and backward."""
    tokens = sizes.batch_size * sizes.context_length
    weights = [(sizes.width, sizes.width)] * 4 + [(sizes.width, sizes.ffn_dim)] * 3
    found = []
    for inner, outer in weights:
        found += [(tokens, inner, outer), (tokens, outer, inner), (inner, tokens, outer)]
    return found


def _products(shapes: list[tuple[int, int, int]]) -> tuple[Callable[[], object], float]:
    """A compiled function that computes all products, and its FLOPs."""
    rng = np.random.default_rng(0)
    pairs = [
        (
            jnp.asarray(rng.standard_normal((rows, inner), np.float32)),
            jnp.asarray(rng.standard_normal((inner, columns), np.float32)),
        )
        for rows, inner, columns in shapes
    ]

    def multiply(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return [a @ b for a, b in pairs]

    return timing.call(multiply, pairs), float(sum(2 * m * k * n for m, k, n in shapes))


def _rates(
    flops: Mapping[str, float], samples: timing.Samples, time: Callable[[list[float]], float]
) -> dict[str, float]:
    return {name: flops[name] / time(samples[name]) for name in samples}


def _of_best(rates: Mapping[str, Any]) -> float:
    return rates["step"] / max(rate for name, rate in rates.items() if name != "step")
