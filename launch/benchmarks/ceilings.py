"""The ceilings of a device, measured: a large matrix product in bfloat16, and a large copy.

A row's fraction of a ceiling counts the work that defines its op: every visible pair of query and
key. A kernel that stops early does less work, so its fraction may exceed one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.contract import Case
from launch.benchmarks import forms, timing
from launch.benchmarks.forms import Sizes
from launch.benchmarks.timing import Result


class Ceilings(NamedTuple):
    """FLOP/s of a matrix product, and bytes/s of a copy (bytes read plus bytes written)."""

    flops: float
    bytes: float

    def results(self, prefix: str) -> list[Result]:
        return [
            Result(name=f"{prefix}/ceiling/TFLOP per s", value=self.flops / 1e12),
            Result(name=f"{prefix}/ceiling/TB per s", value=self.bytes / 1e12),
        ]

    def fractions(self, op: str, case: Case, which: str, samples: list[float]) -> dict[str, float]:
        """The fractions of these ceilings that an op reached; `samples` are seconds of its pass
        `which`, "forward" or "both".
        """
        seconds, work = float(np.median(samples)), forms.work(op, case, which)
        return {
            "flops": work.flops / seconds / self.flops,
            "bytes": work.bytes / seconds / self.bytes,
        }


def measure(sizes: Sizes, pairs: int) -> Ceilings:
    random, shape = np.random.default_rng(0), (sizes.square, sizes.square)
    a, b = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for _ in range(2))
    big = jnp.zeros((sizes.copied // 4,), jnp.float32)
    timers = {
        "product": timing.timer(lambda a, b: a @ b, a, b),
        "copy": timing.timer(lambda x: x + 1.0, big),
    }
    samples = timing.take_turns(timers, pairs)
    product, copy = (float(np.median(samples[side])) for side in timers)
    return Ceilings(2.0 * sizes.square**3 / product, 2.0 * sizes.copied / copy)
