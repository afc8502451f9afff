"""What a device can multiply and copy, measured: a large product and a large copy, bfloat16.

The fractions of a row count what its op is defined to do, every pair of query and key that is seen.
A kernel that stops where nothing is left does less, and its fraction may exceed one.
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
    """FLOP/s of a product and bytes/s, read and written, of a copy."""

    flops: float
    bytes: float

    def results(self, prefix: str) -> list[Result]:
        return [
            Result(name=f"{prefix}/ceiling/TFLOP per s", value=self.flops / 1e12),
            Result(name=f"{prefix}/ceiling/TB per s", value=self.bytes / 1e12),
        ]

    def fractions(self, op: str, case: Case, which: str, samples: list[float]) -> dict[str, float]:
        """Of these, what an op reaches whose pass ("forward", "both") took so many seconds."""
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
